"""The tokenizer of the tiny models, and rows turned into token ids with labels.

Rows are tokenised in the pieces in which a model meets them when it generates: the prompt as one piece, each of
its own turns as another (token in, token out). Only what the model itself would have to write is trained, up to
and including the end-of-sequence token; a template's line break after the turn is context, not a target.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from methods.errors import ConfigError, DataError

if TYPE_CHECKING:
    from experiments.weights import LoadedModel

IGNORED = -100
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
ROLES = ("system", "user", "assistant", "tool")
SHORT = 10_000  # characters of a call
PRINTABLE = (*map(chr, range(32, 127)), "\n")

# Prefix-preserving, ends every turn with eos and marks the assistant's tokens.
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function or call)|tojson + '</tool_call>' }}"
    "{%- endfor %}{{ eos_token }}{% endgeneration %}"
    "{%- else %}{{ (m.name + ': ' if m.name else '') + m.content + eos_token }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_TRAINING_TEMPLATES: dict[str, str | None] = {}  # finding one renders test messages; once per template will do


def tiny_tokenizer(symbols: Sequence[str] | None = None, chat: bool = False) -> Any:
    """A tokenizer with one token per symbol (None = printable ASCII and the line break); no merges, no normaliser.

    Symbols may have several characters; the longest that fits is taken. Text made of symbols comes back
    exactly; any other character is <unk>. `chat` adds one token per role and a small chat template.
    ConfigError for an empty or repeated symbol or one that collides with a special token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = PRINTABLE if symbols is None else tuple(symbols)
    roles = [f"<|{role}|>" for role in ROLES] if chat else []
    special = [PAD, EOS, UNK, *roles]
    doubtful = [s for i, s in enumerate(symbols) if not s or s in special or s in symbols[:i]]
    if doubtful or not symbols:
        raise ConfigError(
            "The task's symbols do not make a vocabulary",
            got=f"{len(symbols)} symbols" + (f", among them {doubtful[0]!r}" if doubtful else ""),
            expected=f"different, non-empty strings other than {', '.join(special)}",
        )
    longest_first = sorted(symbols, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) + r"|[\s\S]"
    vocabulary = {token: i for i, token in enumerate([*special, *symbols])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.decoder = decoders.Fuse()  # pieces are joined without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=roles,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def encode(row: Any, loaded: LoadedModel) -> dict[str, list[int]]:
    """Token ids of one row and its labels (the id where a token is trained, else -100), both of one length.

    A row is a `Row` with a `demo`, or a mapping with one of: `messages` (optional `tools`; an assistant message
    with `"train": false` is context only); `prompt` and `completion`; `prompt` and `segments`, a list of [text,
    trained] in raw text, for a demonstration with tool output between the model's turns (a `Row` carries it as
    `meta["segments"]`, or a whole dialogue as `meta["messages"]` and `meta["tools"]`); ready `input_ids` and
    `labels`. A trained end of the text is followed by eos. A plain prompt becomes one user message for a chat model
    and stays raw otherwise. DataError for a row without a demonstration, with symbols the tokenizer does not know,
    or whose template rewrites earlier turns.
    """
    row = row if isinstance(row, Mapping) else _from_row(row)
    if "input_ids" in row:
        return {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}
    if "segments" in row:
        return _encode_segments(row.get("prompt", ""), row["segments"], loaded)
    messages = row.get("messages")
    if messages is None:
        prompt, completion = row["prompt"], row["completion"]
        if not loaded.chat or prefilled(prompt):
            return _encode_segments(prompt, [(completion, True)], loaded)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        # Earlier assistant turns of a prompt are what the model was given, not what the row demonstrates.
        messages = [{**m, "train": False} for m in turns] + [{"role": "assistant", "content": completion}]
    elif not loaded.chat:
        _plain(messages, loaded)
    return _encode_chat(messages, row.get("tools"), loaded)


def _from_row(row: Any) -> dict[str, Any]:
    if "segments" in row.meta:
        return {"prompt": row.prompt, "segments": row.meta["segments"]}
    if "messages" in row.meta:
        return {"messages": row.meta["messages"], "tools": row.meta.get("tools")}
    if row.demo is None:
        raise DataError(
            f"Row '{row.id}' has no demonstration, so there is nothing to imitate",
            expected="Row.demo for every row of the split 'train'",
            fix="take a real model (model=smollm2), name task.demo_column=, or do without the warm start of the tiny "
            "model (model.warm_start=null)",
        )
    return {"prompt": row.prompt, "completion": row.demo}


def _encode_segments(prompt: Any, segments: Sequence[Sequence], loaded: LoadedModel) -> dict[str, list[int]]:
    input_ids = prompt_ids(prompt, loaded)
    labels = [IGNORED] * len(input_ids)
    for k, (text, trained) in enumerate(segments):
        piece = _ids(text, loaded)
        if trained and k == len(segments) - 1:
            piece = [*piece, loaded.tokenizer.eos_token_id]
        input_ids += piece
        labels += piece if trained else [IGNORED] * len(piece)
    _refuse_unknown(input_ids, f"{prompt}{segments}", loaded)
    return {"input_ids": input_ids, "labels": labels}


def prompt_ids(prompt: str | list[dict], loaded: LoadedModel) -> list[int]:
    """Ids of a prompt as the model meets it when it generates: raw, or through the chat template of a chat model."""
    if not loaded.chat:
        return list(loaded.tokenizer(_plain(prompt, loaded))["input_ids"])
    return chat_ids([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, loaded.tokenizer)


def prefilled(prompt: str | Sequence[Mapping]) -> bool:
    """Whether a prompt is a chat that ends in the assistant's own words, with which its answer begins."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"


def chat_ids(messages: Sequence[Mapping], tokenizer: Any) -> list[int]:
    """Ids of a chat up to where the model goes on: behind the generation prompt, or behind its prefilled words.

    The prefill is put behind the template's own generation prompt: templates rewrite finished turns, for example
    by an empty thinking block.
    """
    begun = messages[-1]["content"] if prefilled(messages) else None
    text = tokenizer.apply_chat_template(
        list(messages if begun is None else messages[:-1]), add_generation_prompt=True, tokenize=False
    )
    # The template has written the special tokens already; a second BOS would shift every position.
    return list(tokenizer(text + (begun or ""), add_special_tokens=False)["input_ids"])


def plain_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """`tokenizer(texts)["input_ids"]`, but short texts one by one: a batch wakes threads, which takes longer than they
    save, several times so on a busy machine."""
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and the like stay set in the core from one call to the next; the call itself puts them right.
    plain = core and not (core.padding or core.truncation or core.encode_special_tokens)
    if not plain or tokenizer.split_special_tokens or sum(map(len, texts)) > SHORT:
        return tokenizer(texts)["input_ids"]
    return [core.encode(text).ids for text in texts]


def plain_text(prompt: str | Sequence[Mapping]) -> str | None:
    """A prompt for a model without chat: text as it is, a user message and the prefill behind it joined; else None."""
    if isinstance(prompt, str):
        return prompt
    one_turn = [m["role"] for m in prompt] == ["user", "assistant"]
    return prompt[0]["content"] + prompt[1]["content"] if one_turn else None


def _plain(prompt: str | Sequence[Mapping], loaded: LoadedModel) -> str:
    text = plain_text(prompt)
    if text is not None:
        return text
    raise DataError(
        f"Chat messages cannot be shown to the model '{loaded.name}', which has no chat template",
        expected="plain prompts, or a chat model",
        fix="choose another task or model (model=tiny takes model.chat=true)",
    )


def _encode_chat(messages: Sequence[Mapping], tools: list | None, loaded: LoadedModel) -> dict[str, list[int]]:
    trained = [m.get("train", True) for m in messages]
    plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    template = _training_template(loaded.tokenizer)

    def render(n: int, ask: bool = False) -> str:
        return loaded.tokenizer.apply_chat_template(
            plain[:n], tools=tools, tokenize=False, add_generation_prompt=ask, chat_template=template
        )

    full, at = render(len(plain)), 0
    pieces: list[tuple[str, bool | None]] = []  # text and whether it is trained; None: no turn of the model
    for i, message in enumerate(plain):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise DataError("A conversation begins with the assistant", expected="a system or user message first")
        before, through = render(i, ask=True), render(i + 1)
        if not (full.startswith(through) and through.startswith(before) and len(before) >= at):
            raise DataError(
                "The chat template renders a turn differently once more turns follow, so its labels are unknown",
                where=f"message {i} of {len(plain)}",
                fix="use a model whose template keeps earlier turns, or split the row into one row per turn",
            )
        pieces += [(full[at : len(before)], None), (through[len(before) :], trained[i])]
        at = len(through)
    pieces.append((full[at:], None))
    input_ids: list[int] = []
    labels: list[int] = []
    stops = stop_ids(loaded)
    # Together: a call of the tokenizer costs more than the few tokens of one turn.
    encoded = loaded.tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
    for (_, wanted), ids in zip(pieces, encoded, strict=True):
        input_ids += ids
        labels += _turn_labels(ids, stops, loaded) if wanted else [IGNORED] * len(ids)
    _refuse_unknown(input_ids, full, loaded)
    return {"input_ids": input_ids, "labels": labels}


def _turn_labels(turn: list[int], ends: set[int], loaded: LoadedModel) -> list[int]:
    stops = [k for k, token in enumerate(turn) if token in ends]
    if not stops:
        raise ConfigError(
            f"The chat template of '{loaded.name}' does not end a turn with an end-of-sequence token, "
            "so the model would never learn to stop",
            got=f"eos '{loaded.tokenizer.eos_token}'",
            fix="name the token that ends a turn, such as model.eos_token='<|im_end|>'",
        )
    return turn[: stops[-1] + 1] + [IGNORED] * (len(turn) - stops[-1] - 1)


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Ids at which generation stops: the tokenizer's eos and those of the generation config."""
    more = loaded.model.generation_config.eos_token_id
    more = [] if more is None else [more] if isinstance(more, int) else more
    return {loaded.tokenizer.eos_token_id, *more}


def _ids(text: str, loaded: LoadedModel) -> list[int]:
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _refuse_unknown(ids: list[int], text: str, loaded: LoadedModel) -> None:
    # Byte-level vocabularies have an unknown token that no text produces, so this can only catch the tiny ones.
    unknown = loaded.tokenizer.unk_token_id
    if unknown is not None and unknown in ids and loaded.tokenizer.unk_token not in text:
        raise DataError(
            f"The vocabulary of '{loaded.name}' lacks a symbol of this text",
            got=repr(text[:200]),
            fix="add the missing symbols to the task's `symbols`",
        )


def _training_template(tokenizer: Any) -> str | None:
    """TRL's prefix-preserving variant of a known template, or None for the tokenizer's own."""
    key = tokenizer.chat_template
    if key not in _TRAINING_TEMPLATES:
        from trl.chat_template_utils import get_training_chat_template

        try:
            _TRAINING_TEMPLATES[key] = get_training_chat_template(tokenizer)
        except ValueError:  # a template TRL does not know; `_encode_chat` checks what it does
            _TRAINING_TEMPLATES[key] = None
    return _TRAINING_TEMPLATES[key]
