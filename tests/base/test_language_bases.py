"""Bases from the disk and in every state: with a LoRA, checkpointed, in half precision, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CompileConfig, LlamaForCausalLM, PreTrainedModel

from internalrl.base.fingerprint import base_fingerprint
from internalrl.base.loading import load_base
from internalrl.controller.steered import SteeredModel
from internalrl.errors import InternalRLError
from tests.support.forgetting import make_forgetful
from tests.support.language import from_config, language_model, prompts, randomise, steer, steered_language_model
from tests.support.tiny import N_Z, SIZES, close, tiny_base, widen

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks for it
TOKENS = prompts(3, 6)
CODE = torch.randn(3, 6, N_Z, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------- from the disk


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba2"])
def test_a_language_model_is_loaded_from_its_folder(tmp_path: Path, kind: str) -> None:
    base = language_model(kind)
    base.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        steered = SteeredModel.from_base(path, SIZES)
        assert type(steered.base) is type(base)
        assert torch.equal(steered.base(input_ids=TOKENS).logits, base(input_ids=TOKENS).logits)
        assert base_fingerprint(steered.base) == base_fingerprint(base)


def test_precision_is_that_of_the_file(tmp_path: Path) -> None:
    language_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert SteeredModel.from_base(tmp_path, SIZES).base.dtype == torch.bfloat16


def test_folders_that_hold_no_whole_model(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-100])
    language_model().save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    language_model().save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(language_model().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    language_model().save_pretrained(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    language_model().model.save_pretrained(tmp_path / "headless")
    (tmp_path / "file").write_text("")
    for name in ("cut", "empty", "pickled", "torn", "headless", "file", "nowhere"):
        with pytest.raises(InternalRLError, match="no whole") as refusal:
            SteeredModel.from_base(tmp_path / name, SIZES)
        assert "\n" not in str(refusal.value), name


def test_names_in_no_cache() -> None:
    with pytest.raises(InternalRLError, match="no model of that name in the cache"):
        SteeredModel.from_base("somebody/some-model", SIZES)


def test_what_is_no_decoder() -> None:
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "vocab_size": 9}
    for model in (nn.Linear(2, 2), AutoModel.from_config(AutoConfig.for_model("t5", **sizes))):
        with pytest.raises(InternalRLError, match="is no Hugging Face decoder"):
            SteeredModel.from_base(model, SIZES)  # type: ignore[arg-type]
    bert = AutoConfig.for_model("bert", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=24)
    with pytest.raises(InternalRLError, match="BertLMHeadModel says of a token depends on later ones"):
        SteeredModel.from_base(from_config(bert), SIZES)
    grid = tiny_base()
    assert load_base(grid) is grid


class Skipping(LlamaForCausalLM):
    """Its last block sees the embeddings once more."""

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **inputs: Any) -> Any:
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        last = self.model.layers[-1]
        handle = last.register_forward_pre_hook(lambda _, args: (args[0] + embeddings, *args[1:]))
        try:
            return super().forward(inputs_embeds=embeddings, **inputs)
        finally:
            handle.remove()


def test_upper_blocks_that_read_more_than_the_residual_are_refused() -> None:
    model = Skipping(language_model().config)
    widen(model, 0.2, seed=0)
    with pytest.raises(InternalRLError, match="read more than what the lower ones hand on"):
        SteeredModel.from_base(model, SIZES)
    assert not any("forward" in vars(block) for block in model.model.layers)


@pytest.mark.parametrize(("kind", "sizes"), [("ctrl", {"n_embd": 16, "dff": 8}), ("openai-gpt", {"n_embd": 16})])
def test_blocks_of_unusual_manners(kind: str, sizes: dict[str, int]) -> None:
    """One scales its embeddings in place, one returns lists."""
    steered = steer(from_config(AutoConfig.for_model(kind, vocab_size=24, n_head=2, n_layer=4, **sizes)))
    residual = steered.residual(TOKENS)
    kept = residual.clone()
    close(steered(residual, CODE), steered(input_ids=TOKENS, code=CODE).logits)
    assert torch.equal(residual, kept)
    if kind == "openai-gpt":  # it has no cache either
        with pytest.raises(InternalRLError, match="without a cache"):
            steered.generate(TOKENS, max_new_tokens=3)


def test_a_base_that_loses_the_past_while_it_generates_is_refused() -> None:
    base = language_model()
    make_forgetful(base, "dropped")
    with pytest.raises(InternalRLError, match="generates as if it had not read all that came before"):
        SteeredModel.from_base(base, SIZES)


# ---------------------------------------------------------------------------------- with a PEFT adapter inside


def with_lora(base: PreTrainedModel, seed: int = 0) -> nn.Module:
    """`base`, changed in place, in PEFT's wrapping."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def test_a_lora_is_part_of_the_base(tmp_path: Path) -> None:
    plain = language_model()(input_ids=TOKENS).logits
    wrapped = with_lora(language_model())
    tuned = wrapped(input_ids=TOKENS).logits
    assert (tuned - plain).abs().mean() > 0.01
    steered = steer(wrapped)  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in steered.base.parameters())
    chosen, trace = steered.generate(TOKENS, max_new_tokens=5, return_trace=True)
    full = steered(input_ids=chosen[:, :-1], **trace.along(6)).logits[:, 5:]
    assert torch.equal(full.argmax(-1), chosen[:, 6:])
    steered.save_pretrained(tmp_path)
    again = SteeredModel.from_pretrained(with_lora(language_model()), tmp_path)  # type: ignore[arg-type]
    assert torch.equal(again(input_ids=TOKENS, code=CODE).logits, steered(input_ids=TOKENS, code=CODE).logits)
    for other in (language_model(), with_lora(language_model(), seed=1)):
        with pytest.raises(InternalRLError, match="load the base that it was trained on"):
            SteeredModel.from_pretrained(other, tmp_path)  # type: ignore[arg-type]
    nn.init.zeros_(steered.metacontroller.up)
    assert torch.equal(steered(input_ids=TOKENS, code=CODE).logits, tuned)


def test_a_lora_may_be_added_without_wrapping() -> None:
    peft = pytest.importorskip("peft")
    base = language_model()
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert base_fingerprint(base) != base_fingerprint(language_model())
    steered = steer(base)
    assert steered.base is base
    assert not torch.equal(steered.generate(TOKENS, max_new_tokens=4), base.generate(TOKENS, max_new_tokens=4))


def test_a_lora_counts_with_its_settings() -> None:
    peft = pytest.importorskip("peft")
    found = set()
    for alpha in (2, 8):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "o_proj"])
        found.add(base_fingerprint(load_base(peft.get_peft_model(language_model(), settings))))
        torch.manual_seed(0)
        found.add(base_fingerprint(load_base(peft.get_peft_model(language_model(), settings))))
    assert len(found) == 2


def test_learned_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        language_model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(InternalRLError, match="learns a prompt"):
        SteeredModel.from_base(wrapped, SIZES)


# ---------------------------------------------------------------------------------- training and precision


@pytest.mark.parametrize("kind", ["llama", "falcon", "mamba2"])
def test_gradients_are_the_same_under_checkpointing(kind: str) -> None:
    """Blocks are computed again in the backward pass, when the tap is closed already."""
    gradients = []
    for checkpointing in (False, True):
        steered, computed = steered_language_model(kind), []
        if checkpointing:
            steered.base.activation_checkpointing_enable()
            steered.base.train()
        part = next(iter(steered.tap.blocks[3].children()))
        part.register_forward_hook(lambda *_, computed=computed: computed.append(1))
        steered(input_ids=TOKENS, code=CODE, labels=TOKENS, use_cache=False).loss.backward()
        assert len(computed) == (2 if checkpointing else 1)
        controller = steered.metacontroller.parameters_of("controller")
        gradients.append(torch.cat([p.grad.flatten() for p in controller if p.grad is not None]))
        assert all(p.grad is None for p in steered.base.parameters())
    assert gradients[0].abs().sum() > 0
    close(*gradients)


def test_labels_give_the_loss_of_the_steered_tokens() -> None:
    steered = steered_language_model()
    found = steered(input_ids=TOKENS, code=CODE, labels=TOKENS)
    expected = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    close(found.loss, expected)


def test_half_precision_bases(tmp_path: Path) -> None:
    """The metacontroller computes in float32; what it adds takes the base's type."""
    base = language_model().to(torch.bfloat16)
    steered = steer(base)
    assert {p.dtype for p in steered.adapter.parameters()} == {torch.float32}
    residual = steered.residual(TOKENS)
    assert residual.dtype == torch.bfloat16
    assert steered.metacontroller.read(residual).dtype == torch.float32
    written = steered.metacontroller.control(residual, CODE)
    exact = steered.metacontroller.control(residual.float(), CODE)
    assert torch.equal(written, residual + (exact - residual.float()).to(torch.bfloat16))
    found, trace = steered.generate(TOKENS, max_new_tokens=4, return_trace=True)
    assert trace.code.dtype == torch.float32
    steered.save_pretrained(tmp_path)
    again = SteeredModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(input_ids=TOKENS, code=CODE).logits, steered(input_ids=TOKENS, code=CODE).logits)
    nn.init.zeros_(steered.metacontroller.up)
    assert torch.equal(steered(input_ids=TOKENS, code=CODE).logits, base(input_ids=TOKENS).logits)
    assert not torch.equal(found, steered.generate(TOKENS, max_new_tokens=4))


def test_autocast_stops_at_the_tap() -> None:
    steered = steered_language_model()
    seen: list[Tensor] = []
    control = steered.metacontroller.control
    steered.metacontroller.control = lambda e, code: seen.append(control(e, code)) or seen[-1]  # type: ignore
    with torch.autocast("cpu", torch.bfloat16):
        residual = steered.residual(TOKENS)
        logits = steered(input_ids=TOKENS, code=CODE).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(seen[0], control(residual, CODE))


def test_weights_may_move_to_another_type() -> None:
    steered = steered_language_model(policy=True).to(torch.bfloat16)
    _, trace = steered.generate(TOKENS, max_new_tokens=3, return_trace=True)
    assert trace.code.isfinite().all()


# ---------------------------------------------------------------------------------- torch.compile


def test_compiled_bases_are_refused() -> None:
    torch._dynamo.reset()
    with pytest.raises(InternalRLError, match=r"wrapped by torch\.compile"):
        SteeredModel.from_base(torch.compile(language_model(), backend="eager"), SIZES)  # type: ignore[arg-type]
    steered = steered_language_model()
    steered.base.compile(backend="eager")
    for call in (lambda: steered(input_ids=TOKENS), lambda: steered.generate(TOKENS)):
        with pytest.raises(InternalRLError, match="compiled in place"):
            call()
    assert steered.generate(TOKENS, max_new_tokens=2, steering="off").shape == (3, 8)


def test_generation_is_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers would compile by itself, as it does for static caches on a GPU."""
    steered = steered_language_model()
    monkeypatch.setattr(type(steered.base), "get_compiled_call", lambda *_: pytest.fail("compiled"))
    everywhere = CompileConfig(backend="eager")
    everywhere._compile_all_devices = True
    options = {"cache_implementation": "static", "max_new_tokens": 3, "compile_config": everywhere}
    steered.generate(TOKENS, **options)
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        steered.base.generate(TOKENS, **options)


def test_several_taps_leave_no_trace() -> None:
    steered = steered_language_model()
    other = SteeredModel.from_base(steered.base, SIZES)
    randomise(other, seed=4)
    plain = steered.base(input_ids=TOKENS).logits
    failing: Any = lambda e: 1 / 0  # noqa: E731
    with pytest.raises(ZeroDivisionError), steered.open_taps((steered.tap, lambda e: e), (other.tap, failing)):
        steered.base(input_ids=TOKENS)
    assert not any(block._forward_hooks for block in steered.tap.blocks)
    assert torch.equal(steered.base(input_ids=TOKENS).logits, plain)
