"""The models: one architecture file and its Hugging Face reader and writer."""
