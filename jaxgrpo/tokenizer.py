"""Chat messages to token ids and completions back to text.

What a message says never becomes a special token, whatever it spells: the template alone writes
those. For every other text the ids are the ones the tokenizer gives the whole rendered chat.
"""

import re
import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from jaxgrpo.chat_template import render
from jaxgrpo.json_file import check_regular, read_object

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_READ = (".json", ".jinja", ".txt", ".model")
_LONGEST_ERROR = 1000  # characters of what the library says, which may quote the file
_PRIVATE_USE = 0xF0000  # a plane of 65,534 characters that mean nothing to templates


class ChatTokenizer:
    """The tokenizer of a model directory, with its chat template and the ids that end a turn.

    Attributes:
      hf: the transformers tokenizer.
      template: the chat template.
      stop_ids: ids that end a completion.
      no_think: thinking is switched off by `/no_think` in the last message, for want of
        `enable_thinking` in the template.
    """

    def __init__(
        self, hf: PreTrainedTokenizerFast, stop_ids: tuple[int, ...], no_think: bool = False
    ):
        self.hf = hf
        self.template = hf.get_chat_template()
        self.stop_ids = stop_ids
        self.no_think = no_think

        # Every added token (`<|im_end|>`, but `<think>` and `<tool_call>` too) gets a second name
        # that nobody can guess, and so does the first character of each. A chat is rendered with
        # those characters of its content renamed, so any added token in the rendering is the
        # template's own, even if the template takes content apart (some remove `/no_think` from
        # it, which would make a token of `<|im_/no_thinkend|>`). It is renamed, the content's
        # characters are put back, and the tokenizer that reads the result knows the added tokens
        # by their second names only.
        added: dict[int, AddedToken] = hf.added_tokens_decoder
        nonce = "".join(chr(_PRIVATE_USE + secrets.randbelow(65_534)) for _ in range(8))
        names = (nonce + chr(_PRIVATE_USE + i) for i in range(65_534))
        self._second_name = {token.content: next(names) for token in added.values()}
        self._hidden = {token.content[0]: next(names) for token in added.values()}
        longest_first = sorted(self._second_name, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

        backend = hf.backend_tokenizer
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        self._plain.add_tokens(
            [
                AddedToken(
                    self._second_name[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,  # no normalizer is to touch the name
                )
                for token in added.values()
            ]
        )
        self._first_id = {
            self._plain.token_to_id(self._second_name[token.content]): i
            for i, token in added.items()
        }
        self._special = {
            i: token.content for i, token in added.items() if token.special and i != hf.unk_token_id
        }
        self._no_text = self._plain.encode("\N{REPLACEMENT CHARACTER}").ids

    def encode_chat(self, messages: Iterable[Mapping[str, str]]) -> list[int]:
        """Renders messages with the template, thinking switched off, up to the model's turn.

        Args:
          messages: objects with `role` and `content`; the last is a user's.

        Returns:
          Token ids of the prompt, at least one.

        Raises:
          ValueError: the template refuses the messages, renders nothing or too much, or the
            tokenizer has a special token that plain text spells.
        """
        chat = [{"role": m["role"], "content": m["content"]} for m in messages]
        if self.no_think:
            chat[-1]["content"] += " /no_think"
        hide = str.maketrans(self._hidden)
        values = {
            **self.hf.special_tokens_map,
            "messages": [m | {"content": m["content"].translate(hide)} for m in chat],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "enable_thinking": False,
        }
        try:
            rendered = render(self.template, values)
        except ValueError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

        text = self._added.sub(lambda match: self._second_name[match[0]], rendered)
        for char, name in self._hidden.items():
            text = text.replace(name, char)
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError("the chat template renders no token")
        # BPE never makes a special token of plain text; a Unigram vocabulary that lists it does.
        if spelt := (set(ids) - self._first_id.keys()) & self._special.keys():
            raise ValueError(
                f"the text {self._special[min(spelt)]!r} in a message is a special token to this"
                " tokenizer even as plain text; take it out"
            )
        return [self._first_id.get(i, i) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion, cut at its length, without the stop token that ended it.

        Special tokens before the end stay visible. Bytes that are not UTF-8, and ids that the model
        has but the tokenizer has not, become U+FFFD.
        """
        ids = list(map(int, ids))
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        tokens = self.hf.convert_ids_to_tokens(ids)
        shown = [
            j
            for i, token in zip(ids, tokens, strict=True)
            for j in ([i] if token is not None else self._no_text)
        ]
        text = self.hf.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """Loads the tokenizer of a Hugging Face directory, from its files alone.

    The stop ids are the tokenizer's EOS and the `eos_token_id` of generation_config.json. Thinking
    is switched off by the template's `enable_thinking`; where the template has no such argument but
    speaks of `/no_think`, or of `<think>` in a Qwen3, by `/no_think` at the end of the prompt.

    Raises:
      ValueError: no such directory, no tokenizer in it, or one without chat template or stop token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"no such model directory: {folder}")
    if not any((folder / name).exists() for name in _FILES):
        raise ValueError(f"no tokenizer in {folder}: it needs one of {', '.join(_FILES)}")
    try:
        for file in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
            if file.suffix in _READ:  # by transformers, which would wait for a pipe without end
                check_regular(file)
        model = _object_if_any(folder / "tokenizer.json").get("model")
        # The library cuts merges by its length in bytes: in the midst of one, the process aborts.
        if isinstance(model, dict) and "merges" in model and model.get("continuing_subword_prefix"):
            raise ValueError("a continuing_subword_prefix in a BPE is not supported")
        config = _object_if_any(folder / "config.json")
        hf = AutoTokenizer.from_pretrained(
            str(folder),
            config=_choice_of_class(config),
            local_files_only=True,
            trust_remote_code=False,
        )
        if not isinstance(hf, PreTrainedTokenizerFast):
            raise ValueError(f"{type(hf).__name__} is not usable; it needs a tokenizer.json")
        if hf.chat_template is None:
            raise ValueError("it has no chat template (chat_template.jinja)")
        template = hf.get_chat_template()
        if not isinstance(template, str):
            raise ValueError("its chat template is no text")
        model_type = config.get("model_type")
        qwen3 = isinstance(model_type, str) and model_type.startswith("qwen3")
        no_think = "enable_thinking" not in template and (
            "/no_think" in template or (qwen3 and "<think>" in template)
        )
        return ChatTokenizer(hf, _stop_ids(hf, folder), no_think)
    except Exception as error:  # whatever the files hold
        what = " ".join(str(error)[:_LONGEST_ERROR].split()) or type(error).__name__
        raise ValueError(f"cannot load the tokenizer of {folder}: {what}") from error


def _choice_of_class(config: dict[str, Any]) -> PreTrainedConfig:
    """What of config.json decides the tokenizer's class, and no more.

    Of a number of layers transformers makes a list, which for some numbers has no end.
    """
    kind, name = config.get("model_type"), config.get("tokenizer_class")
    chosen = PreTrainedConfig()
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        chosen = AutoConfig.for_model(kind)
    if isinstance(name, str):
        chosen.tokenizer_class = name
    return chosen


def _stop_ids(hf: PreTrainedTokenizerFast, folder: Path) -> tuple[int, ...]:
    eos = _object_if_any(folder / "generation_config.json").get("eos_token_id")
    stop_ids = [hf.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    stop_ids = [i for i in stop_ids if i is not None]
    if not stop_ids or not all(type(i) is int and 0 <= i < 2**31 for i in stop_ids):
        raise ValueError(
            f"stop ids {reprlib.repr(stop_ids)}; name an eos_token in tokenizer_config.json or an"
            " eos_token_id in generation_config.json"
        )
    return tuple(dict.fromkeys(stop_ids))


def _object_if_any(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() else {}
