import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from tissuehint.nn.optimization import Optimization, build_optimizer, polynomial

few = settings(max_examples=30)


class Small(nn.Module):
    """An encoder with norms and a factor per channel, a head, one weight that both use, one frozen layer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.LayerNorm(4))
        self.encoder.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
        self.encoder.gamma = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 2).requires_grad_(False)
        self.shared = nn.Conv2d(4, 4, 1)
        self.shared.weight = self.encoder[2].weight


def groups_of(network, **options):
    built = build_optimizer(Optimization(**options), network, 100)
    return built["optimizer"], built["optimizer"].param_groups


class TestGroups:
    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none(self, name):
        network = Small()
        _, groups = groups_of(network, name=name)
        found = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
        assert not set(found) & {id(parameter) for parameter in network.frozen.parameters()}

    def test_rates_of_encoder_and_head(self):
        network = Small()
        _, groups = groups_of(network, learning_rate=0.003, head_multiplier=7)
        rates = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
        for parameter in network.encoder.parameters():
            assert rates[id(parameter)] == 0.003
        for parameter in (*network.head.parameters(), network.shared.bias):
            assert rates[id(parameter)] == pytest.approx(0.021)

    def test_biases_norms_and_factors_do_not_decay(self):
        network = Small()
        _, groups = groups_of(network, weight_decay=0.05)
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        decayed = {name for name, each in network.named_parameters() if each.requires_grad and decay[id(each)] > 0}
        assert {decay[id(each)] for each in network.parameters() if each.requires_grad} == {0, 0.05}
        assert decayed == {"encoder.0.weight", "encoder.2.weight", "head.weight"}

    def test_a_frozen_encoder_leaves_the_head(self):
        network = Small()
        network.encoder.requires_grad_(False)
        _, groups = groups_of(network)
        assert sum(len(group["params"]) for group in groups) == 3


class TestStep:
    def test_one_step_moves_head_and_encoder_by_their_rates(self):
        network = Small()
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        options = {"learning_rate": 0.01, "head_multiplier": 10, "weight_decay": 0, "momentum": 0.9}
        optimizer, _ = groups_of(network, name="sgd", **options)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in network.named_parameters():
            step = {"encoder": 0.01, "frozen": 0.0}.get(name.split(".")[0], 0.1)
            torch.testing.assert_close(before[name] - parameter.detach(), torch.full_like(parameter, step))

    def test_decay_pulls_weights_alone(self):
        network = Small()
        bias, weight = network.head.bias.detach().clone(), network.head.weight.detach().clone()
        options = {"learning_rate": 0.01, "head_multiplier": 10, "weight_decay": 0.5}
        optimizer, _ = groups_of(network, name="adamw", **options)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(network.head.weight.detach(), weight * (1 - 0.1 * 0.5))
        assert torch.equal(network.head.bias.detach(), bias)


class TestPolynomial:
    @few
    @given(st.integers(1, 500), st.floats(0, 3), st.integers(0, 50), st.data())
    def test_the_formula(self, total, power, warmup, data):
        step = data.draw(st.integers(0, total))
        expected = (1 - step / total) ** power
        if step < warmup:
            expected *= (step + 1) / warmup
        assert polynomial(step, total, power, warmup) == pytest.approx(expected)

    @few
    @given(st.integers(1, 100), st.integers(0, 50), st.floats(0.1, 2))
    def test_it_never_turns_negative_after_the_end(self, total, more, power):
        assert polynomial(total + more, total, power) == 0

    def test_torch_follows_the_same_schedule(self):
        weight = nn.Parameter(torch.zeros(1))
        oracle = torch.optim.SGD([weight], lr=0.2)
        reference = torch.optim.lr_scheduler.PolynomialLR(oracle, total_iters=100, power=0.9)
        built = build_optimizer(Optimization(name="sgd", learning_rate=0.2, power=0.9), Small(), 100)
        optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
        assert built["lr_scheduler"]["interval"] == "step"
        for _ in range(100):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(oracle.param_groups[0]["lr"], abs=1e-9)
            assert optimizer.param_groups[-1]["lr"] == pytest.approx(10 * oracle.param_groups[0]["lr"], abs=1e-8)
            for stepped in (optimizer, schedule, oracle, reference):
                stepped.step()


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0}, {"momentum": 1}, {"weight_decay": -1}, {"power": -1}, {"name": "adam"}, {"lr": 1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Optimization(**wrong)
