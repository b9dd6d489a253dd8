"""Activations: what the hook takes, which tokens count, and what happens to texts that are too long."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.capture import (
    Capture,
    Passage,
    absolute_positions,
    decoder_layers,
    edited,
    pieces,
    start_ids,
    take,
)
from experiments.passages import Example, Prompter
from experiments.tokenizers import tiny_tokenizer
from experiments.weights import LoadedModel
from methods.errors import ConfigError, DataError


def model_of(kind="llama", **keys):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    if kind == "gpt2":
        size = {"vocab_size": 101, "n_embd": 16, "n_layer": 3, "n_head": 2}
    elif kind != "gpt_neox":
        size |= {"num_key_value_heads": 2}
    if kind in ("llama", "qwen3", "gpt_neox"):
        size |= {"intermediate_size": 32, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size | keys)).eval()


@pytest.fixture(scope="module")
def loaded():
    tokenizer = tiny_tokenizer(chat=True)
    return LoadedModel(model_of(vocab_size=len(tokenizer)), tokenizer, True, "tiny")


def rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 101, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_the_hook_takes_the_residual_stream(kind):
    model, ids = model_of(kind), rows(9, 9)
    with torch.no_grad():
        states = model(torch.tensor(ids), output_hidden_states=True).hidden_states
    hooks = [len(block._forward_hooks) for block in decoder_layers(model)]  # transformers' own
    assert len(hooks) == 3
    for layer in (0, 1):
        assert torch.allclose(Capture(model, layer).forward(ids), states[layer + 1], atol=1e-5)
    last = Capture(model, 2).forward(ids)  # hidden_states[-1] is behind the final norm
    assert torch.allclose(last, Capture(model, 2, early_stop=False).forward(ids)) and last.shape == states[-1].shape
    assert not torch.allclose(last, states[-1], atol=1e-3)
    assert absolute_positions(model) == (kind == "gpt2")
    assert hooks == [len(block._forward_hooks) for block in decoder_layers(model)]
    with torch.no_grad():
        again = model(torch.tensor(ids), output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))  # ending passes early left nothing behind


def test_batches_do_not_change_what_is_read():
    model = model_of()
    ids = rows(3, 17, 9, 30, 2, 30, 5)
    passages = [Passage(row, [(1, len(row))]) for row in ids]
    alone = [Capture(model, 1).forward([row])[0, 1:] for row in ids]
    for batch_tokens in (1, 40, 4096):
        seen = set()
        for vectors in Capture(model, 1, batch_tokens).read(passages):
            for row in vectors.row_T.unique().tolist():
                assert torch.allclose(vectors.z_Td[vectors.row_T == row], alone[row], atol=1e-5)
                seen.add(row)
        assert seen == set(range(7))


def test_batches_are_bounded_and_lazy():
    model, capture = model_of(), None
    capture = Capture(model, 0, batch_tokens=64)
    sizes, taken = [], 0

    def many():
        nonlocal taken
        for row in rows(*[8] * 2000):
            taken += 1
            yield Passage(row, [(0, 8)])

    for vectors in capture.read(many()):
        sizes.append(len(vectors.z_Td))
        if len(sizes) == 3:
            break
    assert sizes == [64, 64, 64] and taken <= 16 * 64 / 8


def test_spans_leave_out_what_does_not_count():
    model, (row,) = model_of(), rows(10)
    (vectors,) = Capture(model, 1).read([Passage(row, [(2, 4), (7, 9)])])
    assert torch.allclose(vectors.z_Td, Capture(model, 1).forward([row])[0, [2, 3, 7, 8]], atol=1e-6)
    assert Passage(row, [(2, 4), (7, 9)]).counted == [row[i] for i in (2, 3, 7, 8)]


def test_pairs_are_of_the_same_tokens():
    model = model_of()
    base, front = rows(6, 11)
    pair = (Passage(base, [(1, 6)]), Passage([*front, *base], [(12, 17)]))
    other = (Passage(base[::-1], [(0, 6)]), Passage([*front, *base[::-1]], [(11, 17)]))
    found = list(Capture(model, 1).read_pairs([pair, other]))
    without, with_demonstrations = found[0]
    assert len(found) == 1 and torch.equal(without.row_T, with_demonstrations.row_T)
    assert without.z_Td.shape == with_demonstrations.z_Td.shape == (11, 16)
    assert not torch.allclose(without.z_Td, with_demonstrations.z_Td)
    with pytest.raises(DataError, match="not the same"):
        next(Capture(model, 1).read_pairs([(pair[0], Passage([*front, *base], [(11, 16)]))]))


def test_a_prompt_in_front_of_learned_positions_shifts_features_by_itself():
    model, (row,) = model_of("gpt2"), rows(6)
    same = Capture(model, 1).forward([row])[0]
    moved = Capture(model, 1).forward([[*row, *row]])[0]
    assert torch.allclose(same, moved[:6], atol=1e-5) and not torch.allclose(same, moved[6:], atol=1e-2)


def test_editing_the_stream():
    model, ids = model_of(), torch.tensor(rows(8))
    with torch.no_grad():
        before = model(ids).logits
        with edited(model, 1, lambda z: z):
            assert torch.equal(model(ids).logits, before)
        with edited(model, 1, lambda z: z * 0):
            assert not torch.allclose(model(ids).logits, before, atol=1e-2)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("layer", [-1, 3, 1.5])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(ConfigError, match=r"no such decoder layer.*0 to 2"):
        Capture(model_of(), layer)


def test_a_model_without_layers():
    model = model_of()
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="no list of decoder layers"):
        decoder_layers(model)


@pytest.mark.parametrize("spans", [[], [(2, 2)], [(0, 9)], [(4, 2)]])
def test_a_text_without_tokens(spans):
    with pytest.raises(DataError, match="no tokens to average over"):
        list(Capture(model_of(), 1).read([Passage([1, 2, 3], spans)]))


def test_longer_than_the_context():
    with pytest.raises(DataError, match=r"longer than the model's context.*70 tokens.*at most 64"):
        Capture(model_of(), 1).forward(rows(70))
    cut = pieces(rows(150)[0], 64, [5])
    assert [len(p.ids) for p in cut] == [64, 64, 25] and all(p.ids[0] == 5 and p.spans[0][0] == 1 for p in cut)
    assert [t for p in cut for t in p.counted] == rows(150)[0]
    assert sum(len(v.z_Td) for v in Capture(model_of(), 1).read(cut)) == 150
    assert pieces([], 64, [5]) == []
    with pytest.raises(ConfigError, match="no room"):
        pieces([1, 2], 1, [5])


def test_taking_tokens():
    passages = [Passage(row, [(0, 5)]) for row in rows(5, 5, 5)]
    assert len(list(take(passages, 6))) == 2 and len(list(take(passages, 5))) == 1


def test_nan_activations_are_named(loaded):
    from methods.sts.sae import SAE

    sae = SAE("relu", {"W_enc": torch.zeros(16, 4), "b_enc": torch.zeros(4), "W_dec": torch.zeros(4, 16),
                       "b_dec": torch.zeros(16)}, layer=1)  # fmt: skip
    model = model_of()
    with torch.no_grad():
        decoder_layers(model)[0].mlp.down_proj.weight[0, 0] = math.nan
    (vectors,) = Capture(model, 1).read([Passage([1, 2, 3], [(1, 3)])])
    with pytest.raises(DataError, match="layer 1, float32"):
        sae.encode(vectors.z_Td)


# ---------------------------------------------------------------- questions and demonstrations

DEMOS = [Example("What is 2 and 2?", "4"), Example("3 and 4?", "7")]
QUERY = Example("5 and 6?", "It is 11.")


def shown(prompter, passage):
    return [prompter.tokenizer.decode(passage.ids[start:end]) for start, end in passage.spans]


def wide(loaded, context=4096, **keys):
    return Prompter(loaded, context=context, **keys)


def test_only_question_and_answer_count(loaded):
    for chat in (True, False):
        prompter = wide(loaded, chat=chat)
        base, context = prompter.pair(QUERY, DEMOS)
        assert shown(prompter, base) == shown(prompter, context) == ["5 and 6?", "It is 11."]
        assert base.counted == context.counted and len(context.ids) > len(base.ids) and base.spans[0][0] > 0
        text = prompter.tokenizer.decode(context.ids)
        assert text.index("What is 2") < text.index("3 and 4?") < text.index("5 and 6?")
    assert "<|assistant|>It is 11." in prompter.tokenizer.decode(wide(loaded).passage(QUERY).ids)


def test_a_question_without_an_answer(loaded):
    prompter = wide(loaded)
    assert shown(prompter, prompter.passage(Example("Why?"))) == ["Why?"]
    with pytest.raises(DataError, match="empty"):
        prompter.passage(Example(""))


def test_no_counted_token_stands_first(loaded):
    assert start_ids(loaded.tokenizer) == [loaded.tokenizer.eos_token_id]
    assert wide(loaded, chat=False).passage(Example("abc")).spans == [(1, 4)]


def test_too_long_for_all_demonstrations(loaded):
    both = len(wide(loaded).passage(QUERY, DEMOS).ids)
    one = len(wide(loaded).passage(QUERY, DEMOS[1:]).ids)
    assert "2 and 2" not in loaded.tokenizer.decode(wide(loaded, both - 1).pair(QUERY, DEMOS)[1].ids)
    assert len(wide(loaded, one).pair(QUERY, DEMOS)[1].ids) == one
    assert wide(loaded, one - 1).pair(QUERY, DEMOS) is None


def test_a_template_that_hides_messages_is_refused(loaded):
    template = loaded.tokenizer.chat_template
    try:
        loaded.tokenizer.chat_template = "{{ messages[-1].content }}"
        with pytest.raises(ConfigError, match="does not show every message once"):
            wide(loaded).passage(QUERY, DEMOS)
    finally:
        loaded.tokenizer.chat_template = template
