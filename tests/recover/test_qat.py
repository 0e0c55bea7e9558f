from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from networks import assemble, bank_of, exporter_of, graph_of, make_case, make_device, run
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.errors import PlanError, WorkloadError
from autocompress.export.quantize import quantize
from autocompress.plan import Plan, Step
from autocompress.recover import qat
from autocompress.recover.qat import train_quantized
from autocompress.recover.quantizers import GradientRounding, fake_quantized, quantized_layers
from autocompress.recover.recovery import RecoveryContext, recover_network
from autocompress.recover.training import TrainingReport
from autocompress.techniques.precision import Precision
from autocompress.techniques.qat import QAT, Qat
from autocompress.techniques.recovery import Recover
from autocompress.workload import NO_PADDING, Padding, Split

STATIC = Precision(weight_bits=4, activation_bits=8)


def quantized(name: str, decision: Precision = STATIC, layers: list[str] | None = None):
    names = [layer.name for layer in graph_of(name).layers] if layers is None else layers
    return assemble(bank_of(name), Plan(tuple(Step(n, decision) for n in names))).network


def train(
    name: str, network: nn.Module, decision: Qat, context: RecoveryContext | None = None
) -> TrainingReport:
    """By the relative squared error: the outputs are too alike for a softened divergence."""
    case = make_case(name)
    context = replace(context or RecoveryContext(), class_scores=False)
    return train_quantized(
        network, case.network, Split(case.inputs), decision, context, case.inputs
    )


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict((*network.named_parameters(), *network.named_buffers()))


def distance(network: nn.Module, name: str) -> float:
    """From the original's outputs, as a share of their spread."""
    case = make_case(name)
    mine, wanted = run(network, case.inputs)[0], run(case.network, case.inputs)[0]
    return float((mine - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize(("bits", "granularity"), [(3, "channel"), (2, "channel"), (2, "tensor")])
def test_trained_weights_lie_exactly_on_their_trained_grids(bits: int, granularity: str) -> None:
    decision = Precision(
        weight_bits=bits, activation_bits=8, granularity=granularity, rounding="nearest"
    )
    network = quantized("residual", decision)
    before = copy.deepcopy(network)
    train("residual", network, Qat(epochs=15, learning_rate=0.05))
    for name, layer in quantized_layers(network).items():
        old = before.get_submodule(name)
        codes = layer.weight.flatten(1) / layer.weight_scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
        assert codes.abs().max() < 2 ** (bits - 1) - 0.9
        assert layer.weight_scale.shape == old.weight_scale.shape
        assert not torch.equal(layer.weight_scale, old.weight_scale)
        assert granularity == "channel" or len(layer.weight_scale.unique()) == 1
    # The form is that of before, but for the ranges, which no state dict holds.
    assert network.state_dict().keys() == before.state_dict().keys()
    added = tensors(network).keys() - tensors(before).keys()
    assert {name.rpartition(".")[2] for name in added} == {"input_scale", "input_zero_point"}
    assert {type(m) for m in network.modules()} == {type(m) for m in before.modules()}
    assert not any(m.training for m in network.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("gradient_bits", [32, 4])
def test_it_brings_a_network_of_two_bits_back_to_the_original(gradient_bits: int) -> None:
    decision = Precision(weight_bits=2, activation_bits=8, rounding="nearest")
    network = quantized("residual", decision)
    before = distance(network, "residual")
    report = train(
        "residual", network, Qat(epochs=50, learning_rate=0.05, gradient_bits=gradient_bits)
    )
    assert report.held_out_losses[report.best_epoch] < 0.5 * report.held_out_losses[0]
    assert distance(network, "residual") < 0.5 * before


@pytest.mark.parametrize(
    ("name", "signed"),
    [
        ("residual", "unsigned"), ("residual", "signed"), ("depthwise", "unsigned"),
        ("signal", "unsigned"), ("tokens", "signed"),
    ],
)  # fmt: skip
def test_the_file_computes_what_was_trained(name: str, signed: str) -> None:
    network = quantized(name, Precision(weight_bits=4, activation_bits=8, activation_sign=signed))
    train(name, network, Qat(epochs=8))
    case = make_case(name)
    floating = exporter_of(name).export(network)
    model = quantize(floating, [x.numpy() for x in case.inputs], make_device()).model
    scales = [numpy_helper.to_array(i) for i in model.graph.initializer]
    for layer in quantized_layers(network).values():
        assert any(s.shape == () and s == layer.input_scale.numpy() for s in scales)
    session = ort.InferenceSession(model.SerializeToString())
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), case.inputs, strict=True)}
    found = session.run(None, feeds)[0]
    with fake_quantized(network, case.inputs):
        trained = run(network, case.inputs)[0].numpy()
    spread = trained.std(0).mean()
    assert np.abs(found - trained).mean() < 0.05 * spread
    top = np.sort(trained, 1)
    clear = top[:, -1] - top[:, -2] > 0.2 * spread
    assert clear.mean() > 0.6
    assert (found.argmax(1) == trained.argmax(1))[clear].all()


def test_layers_that_read_one_tensor_share_its_grid() -> None:
    network = quantized("residual")
    case = make_case("residual")
    with fake_quantized(network, case.inputs):
        quantizers = {n: m.input_quantizer for n, m in quantized_layers(network).items()}
        assert quantizers["block2.conv1"] is quantizers["block2.shortcut"]
        assert len(set(quantizers.values())) == len(quantizers) - 1
        parameters = [id(p) for p in network.parameters()]
        assert len(parameters) == len(set(parameters))
    one, other = (network.get_submodule(f"block2.{n}") for n in ("conv1", "shortcut"))
    assert torch.equal(one.input_scale, other.input_scale)


class InPlace(nn.Module):
    """Two layers read one tensor, two read what it is after an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first = self.a(y) + self.b(y)
        y.relu_()
        return first + self.c(nn.Dropout()(y) if self.training else y) + self.d(y)


def test_an_operation_in_place_makes_another_tensor() -> None:
    network = InPlace().eval()
    give_scales(network, 8)
    with fake_quantized(network, (torch.randn(8, 4, generator=torch.Generator()),)):
        a, b, c, d = (m.input_quantizer for m in quantized_layers(network).values())
        assert a is b and c is d and a is not c
        assert a.offset is not None and c.offset is None


def give_scales(network: nn.Module, bits: int) -> None:
    how = quantized("flatten").head.integer_weight
    for layer in network.children():
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        layer.register_buffer("weight_scale", scale, persistent=False)
        layer.integer_weight = copy.copy(how)


def test_a_trained_range_is_where_the_next_training_starts() -> None:
    case = make_case("residual")
    network = quantized("residual")
    train("residual", network, Qat(epochs=3, learning_rate=0.05))
    before = {name: t.clone() for name, t in tensors(network).items()}
    with fake_quantized(network, case.inputs[:4]):
        pass
    after = tensors(network)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("gradient_bits", [32, 4])
def test_the_seed_decides_everything(gradient_bits: int) -> None:
    decision = Qat(epochs=3, gradient_bits=gradient_bits)
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(global_seed)
        network = quantized("residual")
        train("residual", network, decision, RecoveryContext(seed=seed))
        results.append(tensors(network))
    same, other = (all(torch.equal(results[0][name], r[name]) for name in r) for r in results[1:])
    assert same and not other


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    decision = Qat(epochs=4, gradient_bits=4)
    whole = quantized("residual")
    train("residual", whole, decision)

    class KilledError(Exception):
        pass

    steps = []

    def advance() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise KilledError

    network = quantized("residual")
    with pytest.raises(KilledError):
        train("residual", network, decision, RecoveryContext(folder=tmp_path, advance=advance))
    resumed = quantized("residual")
    train("residual", resumed, decision, RecoveryContext(folder=tmp_path))
    assert all(torch.equal(t, tensors(resumed)[n]) for n, t in tensors(whole).items())


def test_a_training_with_padding_goes_on_from_none_without(tmp_path: Path) -> None:
    for padding in (NO_PADDING, Padding((None,))):
        context = RecoveryContext(folder=tmp_path, padding=padding)
        train("residual", quantized("residual"), Qat(epochs=1), context)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_gradient_at_a_layer_s_output_is_rounded_to_few_levels() -> None:
    case = make_case("flatten")
    network = quantized("flatten")
    seen = []

    def loss(rounding: GradientRounding | None) -> Tensor:
        with fake_quantized(network, case.inputs, rounding):
            network.zero_grad()
            network(*case.inputs).square().mean().backward()
            return network.head.bias.grad.clone()

    for bits, seed in ((32, 0), (4, 0), (4, 0), (4, 1)):
        rounding = GradientRounding(bits, torch.device("cpu"))
        rounding.generator.manual_seed(seed)
        seen.append(loss(rounding))
    exact, first, same, other = seen
    assert torch.equal(exact, loss(None))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first, exact)
    torch.testing.assert_close(first, exact, rtol=0, atol=0.2 * float(exact.abs().max()))


def test_masked_weights_stay_zero() -> None:
    network = quantized("flatten")
    mask = torch.rand(network.hidden.weight.shape, generator=torch.Generator()) < 0.5
    with torch.no_grad():
        network.hidden.weight.mul_(mask)
    network.hidden.register_buffer("weight_mask", mask, persistent=False)
    train("flatten", network, Qat(epochs=5))
    assert (network.hidden.weight[~mask] == 0).all()
    assert (network.hidden.weight[mask] != 0).float().mean() > 0.5


def test_each_layer_is_trained_as_it_will_run() -> None:
    case = make_case("residual")
    kinds = {
        "stem": Precision(weight_bits=4, activation_bits=32, granularity="group"),
        "block1.conv1": Precision(weight_bits=8, activation_bits=8, activation_range="dynamic"),
        "block2.conv1": Precision(weight_bits=32, activation_bits=16),
        "block2.shortcut": Precision(weight_bits=3, activation_bits=8),
    }
    plan = Plan(tuple(Step(n, d) for n, d in kinds.items()))
    network = assemble(bank_of("residual"), plan).network
    before = copy.deepcopy(network)
    with fake_quantized(network, case.inputs):
        kind = {
            n: getattr(m, "input_quantizer", None) for n, m in quantized_layers(network).items()
        }
        assert kind["stem"] is None
        assert type(kind["block1.conv1"]).__name__ == "BatchQuantizer"
        # Of two widths, each layer has its own grid in the file too.
        assert kind["block2.conv1"] is not kind["block2.shortcut"]
    assert train("residual", network, Qat(epochs=3)).bf16 is False
    ranged = {n for n, m in quantized_layers(network).items() if hasattr(m, "input_scale")}
    assert ranged == {"block2.conv1", "block2.shortcut"}
    wide, narrow = network.block2.conv1.input_scale, network.block2.shortcut.input_scale
    assert 100 < narrow / wide < 500
    assert not torch.equal(network.block2.conv1.weight, before.block2.conv1.weight)
    assert torch.equal(network.block2.conv1.weight_scale, before.block2.conv1.weight_scale)
    floating = exporter_of("residual").export(network)
    quantize(floating, [x.numpy() for x in case.inputs], make_device())


def test_no_epochs_leave_the_network_as_it_is() -> None:
    network = quantized("residual")
    before = copy.deepcopy(network)
    report = train("residual", network, Qat(epochs=0))
    assert report.steps == 0
    assert tensors(network).keys() == tensors(before).keys()
    assert all(torch.equal(t, tensors(network)[n]) for n, t in tensors(before).items())


def test_steps_are_long_where_inputs_are_rounded_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def noted(*given: Any) -> TrainingReport:
        rates.append(given[3].learning_rate)
        return TrainingReport(0, 0.0, (), (), 0, False, False)

    monkeypatch.setattr(qat, "train", noted)
    case = make_case("attention")
    for largest in (1, 1000):
        network = quantized(
            "attention", Precision(weight_bits=8, activation_bits=8, calibration="minmax")
        )
        calibration = tuple(largest * x for x in case.inputs)
        train_quantized(
            network, case.network, Split(case.inputs), Qat(epochs=1), RecoveryContext(), calibration
        )
    near, far = rates
    assert far == 8 * near


def test_no_epochs_need_no_look_at_the_outputs() -> None:
    network, case = quantized("attention"), make_case("attention")
    teacher, runs = copy.deepcopy(case.network), []
    teacher.register_forward_pre_hook(lambda *_: runs.append(1))
    split, context = Split(case.inputs), RecoveryContext()
    train_quantized(network, teacher, split, Qat(epochs=0), context, case.inputs)
    recover_network(network, teacher, split, Recover(epochs=0), context)
    assert not runs


def test_a_network_in_floating_point_is_refused() -> None:
    with pytest.raises(PlanError, match="No layer of the network is quantized"):
        train("flatten", copy.deepcopy(make_case("flatten").network), Qat(epochs=1))


def test_labels_alone_need_targets() -> None:
    with pytest.raises(WorkloadError, match="needs targets"):
        train("flatten", quantized("flatten"), Qat(epochs=1, distil=False))


def test_labels_alone_are_learned() -> None:
    case = make_case("flatten")
    targets = torch.arange(len(case.inputs[0])) % 5
    network = quantized("flatten")
    report = train_quantized(
        network, case.network, Split(case.inputs, targets),
        Qat(epochs=60, learning_rate=0.05, distil=False), RecoveryContext(), case.inputs,
    )  # fmt: skip
    assert report.train_losses[-1] < 0.95 * report.train_losses[0]


def test_only_decisions_that_train_are_offered() -> None:
    offered = [Qat(epochs=0), Qat(epochs=1), Qat(epochs=2, gradient_bits=8)]
    assert QAT.choices(graph_of("flatten"), offered, make_device()) == tuple(offered[1:])
