from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NAMES, graph_of, make_case
from torch import Tensor, nn

from autocompress.bank.gradients import collect_gradients, negative_log_likelihood
from autocompress.errors import WorkloadError
from autocompress.graph import Layer
from autocompress.graph.layers import observe_layers
from autocompress.techniques.technique import LayerGradients


class Written(nn.Module):
    """Named layers and a forward function over them."""

    def __init__(self, forward: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = [forward]

    def forward(self, *inputs: Tensor) -> object:
        return self._forward[0](self, *inputs)


def collected(network: nn.Module, *inputs: Tensor) -> dict[str, LayerGradients]:
    network.eval()
    return collect_gradients(network, layers_of(network, inputs), inputs)


def layers_of(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Layer, ...]:
    return observe_layers(network, tuple(x.clone() for x in inputs))


def sample_losses(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Each sample's own loss, run alone, with the labels that its batch of 32 draws."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for start in range(0, len(inputs[0]), 32):
        batch = tuple(x[start : start + 32] for x in inputs)
        with torch.no_grad():
            scores = network(*(x.clone() for x in batch)).movedim(1, -1)
        flat = scores.reshape(-1, scores.shape[-1]).softmax(1)
        labels = torch.multinomial(flat, 1, generator=generator).reshape(scores.shape[:-1])
        for i in range(len(batch[0])):
            alone = network(*(x[i : i + 1].clone() for x in batch))
            losses.append(F.cross_entropy(alone, labels[i : i + 1], reduction="sum"))
    return losses


def sample_by_sample(network: nn.Module, *inputs: Tensor) -> dict[str, LayerGradients]:
    """Weights' gradients, and those of a gate on every input channel, one sample at a time."""
    network = copy.deepcopy(network).eval()
    found = {}
    for layer in (x for x in layers_of(network, inputs) if x.dense):
        module = network.get_submodule(layer.name)
        gate = torch.ones(layer.in_channels, requires_grad=True)

        def gated(module: nn.Module, args: tuple[Tensor, ...], gate: Tensor = gate) -> Tensor:
            axis = -1 if isinstance(module, nn.Linear) else 1
            return (args[0].movedim(axis, -1) * gate).movedim(-1, axis)

        handle = module.register_forward_pre_hook(gated)
        pairs = [
            torch.autograd.grad(loss, [module.weight, gate])
            for loss in sample_losses(network, inputs)
        ]
        handle.remove()
        fisher = torch.stack([w.reshape(layer.out_channels, -1).square() for w, _ in pairs])
        taylor = torch.stack([g.square() for _, g in pairs])
        found[layer.name] = LayerGradients(fisher.mean(0), taylor.mean(0))
    return found


def tokens(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(F.gelu(m.up(x)).mean(1))


def images(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3)))


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    x -= 0.1
    y = m.a(x)
    y *= 1.5
    return m.head(F.relu(y, inplace=True))


def twice(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.a(torch.tanh(m.a(x)))))


def twice_as_rows(m: nn.Module, x: Tensor) -> Tensor:
    """Once for each sample, once for several rows of each."""
    y = torch.tanh(m.a(x))
    return m.head(torch.tanh(m.a(y.reshape(-1, 4))).reshape(len(x), -1, 4).mean(1))


def rows(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.a(x.reshape(-1, 4))).reshape(len(x), -1))


def read_twice(m: nn.Module, x: Tensor) -> Tensor:
    """A layer's gradient is that of what it reads itself, not of other readers."""
    y = torch.tanh(m.a(x))
    return m.b(y) + m.c(y) + 3 * y[:, :3]


def pixels(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)))


def signal(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(F.relu(m.a(x)).mean(2))


def embedded(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.a(m.table(x))).mean(1))


class PadsItself(nn.Conv2d):
    """As networks from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


NETWORKS: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[[], nn.Module]], Any]] = {
    "tokens": (
        tokens, {"up": lambda: nn.Linear(5, 7), "head": lambda: nn.Linear(7, 3)}, (6, 5)
    ),
    "images": (
        images,
        {
            "a": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
            "b": lambda: nn.Conv2d(4, 5, (1, 3), dilation=2, padding=2),
            "head": lambda: nn.Linear(5, 3),
        },
        (2, 6, 6),
    ),
    "own_padding": (
        images,
        {
            "a": lambda: PadsItself(2, 4, 3, stride=2),
            "b": lambda: PadsItself(4, 5, 3),
            "head": lambda: nn.Linear(5, 3),
        },
        (2, 6, 6),
    ),
    "in_place": (
        in_place, {"a": lambda: nn.Linear(4, 6), "head": lambda: nn.Linear(6, 3)}, (4,)
    ),
    "twice": (twice, {"a": lambda: nn.Linear(4, 4), "head": lambda: nn.Linear(4, 3)}, (4,)),
    "twice_as_rows": (
        twice_as_rows, {"a": lambda: nn.Linear(4, 4), "head": lambda: nn.Linear(4, 3)}, (3, 4)
    ),
    "rows": (rows, {"a": lambda: nn.Linear(4, 2), "head": lambda: nn.Linear(6, 3)}, (3, 4)),
    "read_twice": (
        read_twice,
        {
            "a": lambda: nn.Linear(4, 5),
            "b": lambda: nn.Linear(5, 3),
            "c": lambda: nn.Linear(5, 3),
        },
        (4,),
    ),
    "pixels": (
        pixels, {"a": lambda: nn.Conv2d(2, 4, 3), "b": lambda: nn.Conv2d(4, 3, 1)}, (2, 5, 5)
    ),
    "signal": (
        signal,
        {"a": lambda: nn.Conv1d(3, 4, 5, padding="same"), "head": lambda: nn.Linear(4, 3)},
        (3, 9),
    ),
}  # fmt: skip


def written(name: str) -> tuple[nn.Module, Tensor]:
    forward, layers, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = Written(forward, **{n: make() for n, make in layers.items()}).eval()
    return network, torch.randn(37, *shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_single_samples_give(name: str) -> None:
    network, x = written(name)
    found, wanted = collected(network, x), sample_by_sample(network, x)
    assert found.keys() == wanted.keys()
    for layer, gradients in found.items():
        torch.testing.assert_close(gradients.fisher, wanted[layer].fisher, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(gradients.taylor, wanted[layer].taylor, rtol=1e-4, atol=1e-7)
        assert bool((gradients.fisher > 0).any()) and bool((gradients.taylor > 0).any())


def test_inputs_without_gradients_of_their_own() -> None:
    torch.manual_seed(0)
    network = Written(
        embedded, table=nn.Embedding(9, 4), a=nn.Linear(4, 5), head=nn.Linear(5, 3)
    ).eval()
    x = torch.randint(0, 9, (40, 6))
    found, wanted = collected(network, x), sample_by_sample(network, x)
    for layer in ("a", "head"):
        torch.testing.assert_close(found[layer].fisher, wanted[layer].fisher, rtol=1e-4, atol=1e-7)


def test_the_closed_form_for_logistic_regression() -> None:
    """E over labels of (p - y)² is p (1 - p), so the information is p (1 - p) x²."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 4)).eval()
    x = torch.randn(1, 3).repeat(20_000, 1)
    found = collected(network, x)["0"]
    p = network(x[:1]).softmax(1)[0].detach()
    wanted = (p * (1 - p))[:, None] * x[0].square()
    torch.testing.assert_close(found.fisher, wanted, rtol=0.05, atol=0)
    weight = network[0].weight.detach()
    spread = torch.diag(p) - torch.outer(p, p)
    change = torch.einsum("oc,op,pc->c", weight, spread, weight) * x[0].square()
    torch.testing.assert_close(found.taylor, change, rtol=0.05, atol=0)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_outputs_that_are_no_class_scores_are_means(shape: tuple[int, ...]) -> None:
    """A Gaussian's information of the mean is one: x² of a linear layer."""
    torch.manual_seed(2)
    layer = nn.Linear(3, 1)
    network = Written(lambda m, x: m.a(x).reshape(len(x), *shape), a=layer).eval()
    x = torch.randn(1, 3).repeat(20_000, 1)
    found = collected(network, x)["a"]
    torch.testing.assert_close(found.fisher[0], x[0].square(), rtol=0.05, atol=0)


def test_every_output_counts() -> None:
    torch.manual_seed(3)
    network = Written(
        lambda m, x: {"classes": m.a(x), "rest": [m.b(x), x.argmax(1)]},
        a=nn.Linear(3, 4), b=nn.Linear(3, 2),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3).repeat(20_000, 1)
    found = collected(network, x)
    torch.testing.assert_close(found["b"].fisher, x[0].square().expand(2, -1), rtol=0.05, atol=0)
    assert bool((found["a"].fisher < x[0].square() / 4 * 1.1).all())


def test_probabilities_are_as_good_as_logits() -> None:
    network, x = written("tokens")
    softened = Written(lambda m, x: m.inner(x).softmax(1), inner=network)
    logged = Written(lambda m, x: m.inner(x).log_softmax(1), inner=network)
    wanted = collected(network, x)["up"].fisher
    for other in (softened, logged):
        found = collected(other, x)["inner.up"].fisher
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)


def test_labels_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 30.0, 0.0]]).repeat(50, 1)
    loss = negative_log_likelihood(scores, torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(0, abs=1e-3)


def test_outputs_without_gradients_are_an_error_with_advice() -> None:
    network = Written(lambda m, x: m.a(x).argmax(1), a=nn.Linear(3, 4))
    with pytest.raises(WorkloadError, match="no gradients") as caught:
        collected(network, torch.randn(5, 3))
    assert caught.value.advice


def test_a_network_that_overwrites_what_backward_needs_is_an_error_with_advice() -> None:
    network = Written(lambda m, x: m.b(m.a(x).exp().mul_(2)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with pytest.raises(WorkloadError, match="inplace") as caught:
        collected(network, torch.randn(5, 3))
    assert caught.value.advice


def test_an_input_that_is_overwritten_later_was_read_before() -> None:
    def overwriting(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        x.zero_()
        return y

    torch.manual_seed(5)
    plain = Written(lambda m, x: m.a(x), a=nn.Linear(3, 4)).eval()
    x = torch.randn(40, 3)
    layers = layers_of(plain, (x,))
    wanted = collect_gradients(plain, layers, (x,))["a"]
    found = collect_gradients(Written(overwriting, a=plain.a), layers, (x,))["a"]
    assert torch.equal(found.fisher, wanted.fisher) and bool(found.fisher.any())


def test_a_layer_behind_no_grad_has_zeros() -> None:
    def cut(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = m.a(x)
        return m.b(y)

    found = collected(Written(cut, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(5, 3))
    assert not bool(found["a"].fisher.any()) and not bool(found["a"].taylor.any())
    assert bool(found["b"].fisher.any())


def test_a_layer_that_sees_no_samples_counts_the_batch_as_one() -> None:
    """What is the same for all samples is called with a batch of its own."""
    torch.manual_seed(4)
    table = torch.randn(5, 3)
    network = Written(
        lambda m, x: m.head(torch.tanh(x + m.a(table).sum(0))),
        a=nn.Linear(3, 4), head=nn.Linear(4, 3),
    ).eval()  # fmt: skip
    x = torch.randn(1, 4).repeat(64 * 32, 1)
    several = collected(network, x)["a"].fisher
    whole = Written(
        lambda m, x: m.head(torch.tanh(x + m.a(table.expand(len(x), -1, -1)).sum(1))),
        a=network.a, head=network.head,
    )  # fmt: skip
    wanted = collected(whole, x)["a"].fisher
    # 64 batches, each a chi-square of one degree: a spread of 18 % around the same value.
    assert float((several / wanted - 1).abs().max()) < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_every_dense_layer_of_every_network(name: str) -> None:
    case, graph = make_case(name), graph_of(name)
    before = {k: v.clone() for k, v in case.network.state_dict().items()}
    inputs = tuple(x.clone() for x in case.inputs)
    steps: list[None] = []
    found = collect_gradients(case.network, graph.layers, inputs, lambda: steps.append(None))
    assert len(steps) == len(inputs[0]) // 32
    assert set(found) == {layer.name for layer in graph.layers if layer.dense}
    for layer in graph.layers:
        if layer.name in found:
            gradients = found[layer.name]
            assert gradients.fisher.shape == (layer.out_channels, layer.in_features)
            assert gradients.taylor.shape == (layer.in_channels,)
            assert gradients.fisher.dtype == gradients.taylor.dtype == torch.float32
            assert bool(gradients.fisher.any()) and bool(gradients.taylor.any())
    assert all(torch.equal(v, before[k]) for k, v in case.network.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(inputs, case.inputs, strict=True))
    assert all(p.requires_grad and p.grad is None for p in case.network.parameters())
    assert not any(m._forward_hooks for m in case.network.modules())


def test_a_small_budget_of_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = written("images")
    wanted = collected(network, x)
    monkeypatch.setattr("autocompress.bank.gradients._HELD", 200)
    for name, found in collected(network, x).items():
        torch.testing.assert_close(found.fisher, wanted[name].fisher)
        torch.testing.assert_close(found.taylor, wanted[name].taylor)
