"""The model suite: its configurations, its bytes, its gate, and what becomes of columns that fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicLayer

from flash_decoding.bench.baselines import decoder_models, transformers_models
from flash_decoding.bench.baselines.model_columns import BOUND
from flash_decoding.bench.models.case import ModelCase, lengths_of
from flash_decoding.bench.models.check import Truth, checked_cases
from flash_decoding.bench.models.column import ModelColumn, Prepare
from flash_decoding.bench.models.configurations import CONFIGURATIONS, Configuration
from flash_decoding.bench.models.reads import weight_bytes
from flash_decoding.bench.models.row import ModelRow
from flash_decoding.bench.models.source import Source
from flash_decoding.bench.models.stepping import StepBurst
from flash_decoding.bench.models.suite import ModelSuite
from flash_decoding.bench.timing import Effort
from flash_decoding.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 100,
}
CASE = ModelCase(
    context=64, lengths=(64,), burst=2, layers=2, heads_kv=2, head_dim=32, dtype=torch.float32, device=CPU
)
BRIEF = Effort(budget_s=0.0, min_samples=2, max_samples=2, warmups=1)


def source(**changes: Any) -> Source:
    return Source("small", LlamaConfig(**(SMALL | changes)))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.name)
def test_parameters_are_as_many_as_published(configuration: Configuration) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration.config())  # type: ignore[no-untyped-call]
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == pytest.approx(configuration.parameters, rel=0.02)


def test_models_are_found_by_name_whatever_its_case() -> None:
    found = Source.find("codellama-34b")
    assert (found.name, found.layers, found.heads_kv, found.head_dim) == ("CodeLlama-34B", 48, 8, 128)
    assert found.checkpoint is None


def test_random_weights_are_those_of_a_fresh_model() -> None:
    model = source().load(torch.bfloat16, CPU)
    norm, projection = model.model.norm.weight, model.model.layers[1].mlp.up_proj.weight
    assert (norm.dtype, projection.dtype) == (torch.bfloat16, torch.bfloat16)
    assert bool((norm == 1).all())
    assert float(projection.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not model.training


def test_a_slice_keeps_the_widths_and_two_layers() -> None:
    whole = Source("deep", LlamaConfig(**(SMALL | {"num_hidden_layers": 5})))
    part = whole.slice(torch.float32, CPU)
    assert len(part.model.layers) == 2
    assert part.lm_head.weight.shape == (100, 128)
    assert whole.layers == 5


def test_lengths_are_equal_or_spread_from_an_eighth() -> None:
    assert lengths_of(3, 512, ragged=False) == (512, 512, 512)
    assert lengths_of(3, 800, ragged=True) == (100, 450, 800)
    with pytest.raises(InvalidInput, match="batch: got 1; wanted 2 or more"):
        lengths_of(1, 512, ragged=True)


def test_live_keys_and_values_are_counted_by_hand() -> None:
    case = replace(CASE, lengths=(64, 10))
    assert case.kv_bytes == 74 * 2 * 2 * 32 * 4 * 2  # tokens, k and v, heads, head_dim, fp32, layers
    assert case.filled == (62, 8)


@pytest.mark.parametrize(("tied", "tables"), [(False, 100 * 128 + 3 * 128), (True, 100 * 128)])
def test_weights_that_a_step_reads_are_counted_by_hand(tied: bool, tables: int) -> None:
    """A table that only embeds counts with the rows of the batch; one that gives the logits as a whole."""
    model = source(tie_word_embeddings=tied).load(torch.bfloat16, CPU)
    attention = 2 * 128 * 128 + 2 * 64 * 128
    layer = attention + 3 * 96 * 128 + 2 * 128
    assert weight_bytes(model, 3) == 2 * (2 * layer + 128 + tables)


@functools.cache
def truth(batch: int, dtype: torch.dtype = torch.bfloat16, number: int = -1) -> Truth:
    like = replace(CASE, lengths=(64,) * batch, dtype=dtype)
    model = source().slice(dtype, CPU)
    return Truth.of(model, checked_cases(like)[number], transformers_models.eager)


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)


COLUMNS = (
    transformers_models.EAGER,
    transformers_models.SDPA,
    transformers_models.COMPILED,
    decoder_models.OURS,
)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: c.name)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_column_gives_the_right_logits(
    column: ModelColumn, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ragged batches, and of a short sequence in a long cache; before a rewind and after it."""
    uncompiled(monkeypatch)
    verdict = truth(batch, dtype).judge(column)
    assert verdict.passed, verdict


def test_a_batch_of_one_is_checked_short_and_long() -> None:
    assert [case.lengths for case in checked_cases(CASE)] == [(4096,), (64,)]
    assert checked_cases(replace(CASE, lengths=(9, 9, 9)))[0].lengths == (64, 2080, 4096)


class Spoilt(transformers_models.DynamicStepper):
    """Eager steps with something wrong."""

    def __init__(self, model: PreTrainedModel, case: ModelCase) -> None:
        super().__init__(model, case, "eager")

    def at(self, position: int, tokens: Tensor) -> Tensor:
        """A step at this position."""
        places = torch.full_like(tokens, position)
        result = self._model(input_ids=tokens, past_key_values=self._cache, position_ids=places)
        self._steps += 1
        logits: Tensor = result.logits
        return logits


class LostKey(Spoilt):
    """The oldest key is not there; positions are right."""

    def __init__(self, model: PreTrainedModel, case: ModelCase) -> None:
        super().__init__(model, case)
        for layer in self._cache.layers:
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]

    def step(self, tokens: Tensor) -> Tensor:
        return self.at(self._longest + self._steps, tokens)


class NoRewind(Spoilt):
    """Keeps the tokens of before."""

    def rewind(self) -> None:
        pass


class Infinite(Spoilt):
    """Overflows."""

    def step(self, tokens: Tensor) -> Tensor:
        return super().step(tokens) / 0


class Late(Spoilt):
    """Positions are one too low."""

    def step(self, tokens: Tensor) -> Tensor:
        return self.at(self._longest + self._steps - 1, tokens)


@pytest.mark.parametrize(
    ("spoilt", "complaint"), [(LostKey, ""), (NoRewind, ""), (Infinite, "NaN or infinity"), (Late, "")]
)
def test_a_wrong_column_does_not_pass(spoilt: Prepare, complaint: str) -> None:
    verdict = truth(1).judge(ModelColumn("spoilt", "", "peer", spoilt))
    assert not verdict.passed
    assert complaint in verdict.complaint


class Counting:
    """A stepper that names the tokens it was fed, and whose likeliest token is the next number."""

    def __init__(self) -> None:
        self.told: list[int | str] = []

    def step(self, tokens: Tensor) -> Tensor:
        self.told.append(int(tokens))
        return nn.functional.one_hot(tokens + 1, 50).float()

    def rewind(self) -> None:
        self.told.append("rewind")

    def close(self) -> None:
        self.told.append("close")


def test_a_burst_rewinds_and_feeds_the_likeliest_token_back() -> None:
    stepper = Counting()
    burst = StepBurst(stepper, replace(CASE, burst=3))
    assert burst.calls == 3
    for _ in range(2):
        assert burst.launch()() > 0
    assert stepper.told == ["rewind", 0, 1, 2, "rewind", 3, 4, 5]


def measured(*columns: ModelColumn, compiled: frozenset[int] = frozenset()) -> ModelRow:
    (row,) = measured_rows([CASE], *columns, compiled=compiled)
    return row


def measured_rows(
    cases: list[ModelCase], *columns: ModelColumn, compiled: frozenset[int] = frozenset()
) -> list[ModelRow]:
    suite = ModelSuite(
        source=source(),
        cases=cases,
        columns=columns,
        compiled_contexts=compiled,
        bandwidth=1e9,
        effort=BRIEF,
    )
    told: list[str] = []
    rows = list(suite.rows(told.append))
    assert len(told) == suite.steps
    return rows


def raising(error: Exception) -> Callable[[PreTrainedModel, ModelCase], Counting]:
    def prepare(model: PreTrainedModel, case: ModelCase) -> Counting:
        if case.context == CASE.context:
            raise error
        return transformers_models.eager(model, case)  # type: ignore[return-value]  # any stepper will do

    return prepare


def test_the_bound_is_bytes_over_bandwidth() -> None:
    row = measured(decoder_models.OURS, BOUND)
    assert row.bytes_read == row.weight_bytes + CASE.kv_bytes
    assert row.seconds("bound") == pytest.approx(row.bytes_read / 1e9)
    assert row.cells["ours"].status == "timed"
    assert row.tokens_per_s("bound") == pytest.approx(1e9 / row.bytes_read)


def test_a_column_without_memory_says_so_and_costs_no_other() -> None:
    large = ModelColumn("large", "", "peer", raising(torch.OutOfMemoryError("tried to allocate 1 TiB")))
    broken = ModelColumn("broken", "", "peer", raising(TypeError("no such   kernel")))
    row = measured(large, broken, transformers_models.EAGER, BOUND)
    assert row.cells["large"].reason == "out of memory: tried to allocate 1 TiB"
    assert row.cells["broken"].reason == "TypeError: no such kernel"
    assert row.cells["eager"].status == "timed"


def test_a_column_that_runs_some_contexts_is_checked_and_timed_there() -> None:
    picky = replace(transformers_models.EAGER, why_not=lambda case: "too long" if case.context > 64 else None)
    cases = [CASE, replace(CASE, context=128, lengths=(128,))]
    first, second = measured_rows(cases, picky, BOUND)
    assert first.cells["eager"].status == "timed"
    assert second.cells["eager"].reason == "too long"


def test_a_wrong_column_is_not_timed() -> None:
    row = measured(ModelColumn("spoilt", "", "peer", LostKey), BOUND)
    assert row.cells["spoilt"].status == "wrong"
    assert row.tokens_per_s("spoilt") is None


def test_columns_that_compile_do_so_for_some_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    row = measured(transformers_models.COMPILED, BOUND)
    assert row.cells["sdpa compiled"].reason == "context 64 is not among those to compile for"
    row = measured(transformers_models.COMPILED, BOUND, compiled=frozenset({64}))
    assert row.cells["sdpa compiled"].status == "timed"
