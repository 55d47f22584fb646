"""Constrained decoding: only tokens are drawn after which the answer can still meet its schema.

Which tokens those are is a function of the schema and of the tokens before, and comes from
llguidance as one bit a token. The sampler asks for it at each pass; `Constraint.replay` gives the
same for completions that are there already, so that the trainer takes their log-probabilities from
the distribution that they were drawn from.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import llguidance.hf
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from llguidance import LLExecutor, LLMatcher

from jaxgrpo.lookup import NO_TOKEN
from jaxgrpo.redact import printable
from jaxgrpo.sharding import Rules
from jaxgrpo.tokenizer import ChatTokenizer
from jaxgrpo.types import Masks

_ALL = np.uint32(0xFFFFFFFF)
# Between the parts of a JSON text: nothing, a space, or a line's end and an indentation. Left to
# itself a model may write white space without end, and that is as valid as anything.
_SPACE = r" ?|\n[ \t]{0,32}"
_SETTINGS: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": _SPACE,
    "coerce_one_of": True,  # to anyOf; what the grammar lets through is judged all the same
    "lenient": False,
}
_GRAMMARS = 256  # kept; rows may all have schemas of their own


class Constraint:
    """The tokens that may come next, for each branch of a batch.

    Args:
      tokenizer: of the model.
      vocab: the model's vocabulary size V; ids that the tokenizer does not have are never allowed.
      schema: of rows that have none of their own.
    """

    def __init__(self, tokenizer: ChatTokenizer, vocab: int, schema: dict[str, Any] | bool = True):
        self._tokens = llguidance.hf.from_tokenizer(
            tokenizer.hf, n_vocab=vocab, eos_token=list(tokenizer.stop_ids)
        )
        self._stop_ids = frozenset(tokenizer.stop_ids)
        self._schema = schema
        self._workers = LLExecutor()
        self._grammars: dict[str, Any] = {}
        self._branches: list[list[_Branch]] = []
        self._lock = threading.Lock()  # each device asks from a thread of its own
        self.words = -(-vocab // 32)

    def check(self, schema: dict[str, Any] | bool, where: str) -> None:
        """Refuses a schema that cannot be held to.

        Raises:
          ValueError: with `where` and what is not supported.
        """
        if why := self.fault(schema):
            raise ValueError(
                f"{where}: answers cannot be constrained to this schema: {why};"
                " change it, or leave out sampling.constrain"
            )

    def fault(self, schema: dict[str, Any] | bool) -> str:
        """Why answers cannot be held to a schema; empty if they can."""
        failed, why = LLMatcher.validate_grammar_with_warnings(self._text(schema), self._tokens)
        return printable(why[0], 300) if failed else ""

    def begin(self, rows: Sequence[Mapping[str, Any]], group: int) -> None:
        """Makes ready for `group` empty completions of each of a batch's rows."""
        self._branches = [
            [_Branch(self._matcher(row), self._stop_ids) for _ in range(group)] for row in rows
        ]

    def masks(
        self, row_P: Array, branch_PGB: Array, length_PG: Array, ids_PGT: Array, rules: Rules
    ) -> Array:
        """Inside of `jax.jit`: the bits of T positions, uint32 `[P, G, T, V / 32]`.

        Args:
          row_P: the place of each problem among those of `begin`.
          branch_PGB: the prompt's last token and the completion so far.
          length_PG: tokens of the completion so far; never fewer than the last time.
          ids_PGT: its last token, and T - 1 that may come next: position t is that after them.
          rules: how problems are divided; each device asks for its own.
        """

        def ask(*arrays: Array) -> Array:
            shape = (*arrays[-1].shape, self.words)
            result = jax.ShapeDtypeStruct(shape, jnp.uint32)
            return jax.pure_callback(self._masks, result, *arrays)

        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            spec = PartitionSpec(rules.problems)
            ask = jax.shard_map(ask, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return ask(row_P, branch_PGB, length_PG, ids_PGT)

    def replay(
        self, rows: Sequence[Mapping[str, Any]], tokens_PGC: np.ndarray, length_PG: np.ndarray
    ) -> Masks:
        """The masks that completions were drawn under.

        Args:
          rows: of the problems.
          tokens_PGC: their completions.
          length_PG: tokens of each.

        Returns:
          `Masks`; past the end of a completion all tokens are allowed.
        """
        index_PGC = np.zeros(tokens_PGC.shape, np.int32)
        tables: list[list[bytes]] = []
        for row, tokens_GC, length_G, index_GC in zip(
            rows, tokens_PGC, length_PG, index_PGC, strict=True
        ):
            branches = [_Branch(self._matcher(row), self._stop_ids) for _ in tokens_GC]
            drafts = [tokens_C[:n] for tokens_C, n in zip(tokens_GC, length_G, strict=True)]
            words_GTW = self._fill(branches, [draft[:-1] for draft in drafts])
            known = {np.full(self.words, _ALL).tobytes(): 0}
            for g, n in enumerate(length_G):
                for c in range(n):
                    index_GC[g, c] = known.setdefault(words_GTW[g, c].tobytes(), len(known))
            tables.append(list(known))
        # Few sizes: each is a program to compile.
        size = 1 << max(len(table) - 1 for table in tables).bit_length()
        table_PUW = np.full((len(tables), size, self.words), _ALL)
        for table_UW, table in zip(table_PUW, tables, strict=True):
            for words_W, data in zip(table_UW, table, strict=False):
                words_W[:] = np.frombuffer(data, np.uint32)
        return Masks(table_PUW, index_PGC)

    def _masks(self, *arrays: Array) -> np.ndarray:
        """What `masks` asks for, on the host."""
        row_P, branch_PGB, length_PG, ids_PGT = map(np.asarray, arrays)
        p, g, t = ids_PGT.shape
        with self._lock:
            branches = [branch for row in row_P for branch in self._branches[row]]
            for branch, tokens_B, n in zip(
                branches, branch_PGB.reshape(p * g, -1), length_PG.ravel(), strict=True
            ):
                branch.follow(tokens_B[1 : 1 + n])
            words = self._fill(branches, list(ids_PGT.reshape(p * g, t)[:, 1:]))
        return words.reshape(p, g, t, -1)

    def _fill(self, branches: "Sequence[_Branch]", drafts: Sequence[np.ndarray]) -> np.ndarray:
        """`[branches, T, W]`: the masks after each branch and after each token of its draft.

        From where a draft is not allowed on, and after a stop token, everything is.
        """
        size = 1 + max(len(draft) for draft in drafts)
        words = np.full((len(branches), size, self.words), _ALL)
        alone: list[tuple[Any, int]] = []
        with_draft: list[tuple[Any, int, list[int]]] = []
        for i, (branch, draft) in enumerate(zip(branches, drafts, strict=True)):
            if branch.ended:
                continue
            if allowed := branch.allowed(draft):
                with_draft.append((branch.matcher, i * size, allowed))
            else:
                alone.append((branch.matcher, i * size))
        to = words.ctypes.data, words.itemsize * self.words, len(words) * size
        if alone:
            self._workers.unsafe_compute_mask_ptr(alone, *to)
        if with_draft:
            self._workers.unsafe_compute_mask_ptr_with_draft_token(with_draft, *to)
        return words

    def _matcher(self, row: Mapping[str, Any]) -> Any:
        text = self._text(row.get("schema", self._schema))
        if text not in self._grammars:
            if len(self._grammars) == _GRAMMARS:
                self._grammars.pop(next(iter(self._grammars)))
            self._grammars[text] = LLMatcher(self._tokens, text, log_level=0)
        return self._grammars[text].deep_copy()

    def _text(self, schema: dict[str, Any] | bool) -> str:
        # Settings go into an object. It may hold some of its own already, and comes from the data.
        as_object = schema if isinstance(schema, dict) else {"allOf": [schema]}
        return LLMatcher.grammar_from_json_schema(
            json.dumps(as_object, default=_number), overrides=_SETTINGS
        )


def _number(value: Decimal) -> int | float:
    return int(value) if value == int(value) else float(value)


class _Branch:
    """One completion as the grammar sees it."""

    def __init__(self, matcher: Any, stop_ids: frozenset[int]):
        self.matcher = matcher
        self.ended = False
        self._stop_ids = stop_ids
        self._length = 0

    def follow(self, tokens: np.ndarray) -> None:
        """Goes on to a completion that begins with what was followed before."""
        new = tokens[self._length :].tolist()
        self._length = len(tokens)
        if new and not self.ended:
            self.ended = new[-1] in self._stop_ids
            self.matcher.consume_tokens(new)

    def allowed(self, draft: np.ndarray) -> list[int]:
        """As much of a draft as the grammar allows."""
        tokens = [*takewhile(lambda token: token != NO_TOKEN, draft.tolist())]
        return tokens[: self.matcher.validate_tokens(tokens)]
