"""sb3-contrib's RecurrentPPO: one LSTM for the actor and one for the critic. To play, it runs a
step at a time. To learn, it runs over a padded batch of episodes; because each begins with a reset,
the client loops over the steps. With `resets=` the loop is one call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.ppo_recurrent.policies import MlpLstmPolicy
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

import fastrnn
from tests.clients.support import (
    Client,
    Ratio,
    assert_checkpoints_pass,
    assert_restores,
    assert_same,
    assert_same_gradients,
    assert_same_outputs,
    kinds,
    replaced,
)

CLIENT = Client("sb3_contrib", "LSTM 256, actor and critic")
STEPS, ENVIRONMENTS = 128, 2  # steps and batch size are the client's defaults


class Recall(gymnasium.Env):
    """The first observation is a sign; some steps later an action must name it."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.sign = int(self.np_random.integers(2))
        self.left = int(self.np_random.integers(20, 60))
        return np.array([2 * self.sign - 1, 0, 0], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.left -= 1
        over = self.left == 0
        noise, asked = self.np_random.uniform(-1, 1), float(self.left == 1)
        return (
            np.array([0.1 * action, noise, asked], np.float32),
            float(over and action == self.sign),
            over,
            False,
            {},
        )


class WithResets(MlpLstmPolicy):
    """The client's policy, with one call in place of its loop over steps."""

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sequences = lstm_states[0].shape[1]
        x = features.reshape(sequences, -1, lstm.input_size).transpose(0, 1)
        starts = episode_starts.reshape(sequences, -1).transpose(0, 1).bool()
        output, states = lstm(x, lstm_states, resets=starts)
        return output.transpose(0, 1).flatten(0, 1), states


def agent(policy: type = MlpLstmPolicy) -> RecurrentPPO:
    environment = make_vec_env(Recall, ENVIRONMENTS, seed=0)
    return RecurrentPPO(
        policy, environment, n_steps=STEPS, batch_size=128, n_epochs=3, seed=0, device="cpu"
    )


@pytest.fixture(scope="module")
def learnt() -> RecurrentPPO:
    return agent().learn(2 * STEPS * ENVIRONMENTS)


@pytest.fixture
def torchs(learnt: RecurrentPPO) -> nn.Module:
    # The agent's own policy keeps its last distribution, whose graph cannot be copied.
    policy = agent().policy
    policy.load_state_dict(learnt.policy.state_dict())
    return policy


@pytest.fixture
def ours(torchs: nn.Module) -> nn.Module:
    return replaced(torchs)


@pytest.fixture(scope="module")
def data(learnt: RecurrentPPO) -> Any:
    """A batch of played steps: whole episodes and parts of others."""
    torch.manual_seed(0)
    np.random.seed(0)
    batch = next(learnt.rollout_buffer.get(128))
    assert batch.episode_starts.sum() > 2
    return batch


def judge(policy: nn.Module, data: Any) -> tuple[Tensor, ...]:
    """Values, probabilities and entropy, which each step of learning computes."""
    dtype = next(policy.parameters()).dtype
    states = type(data.lstm_states)(
        *(tuple(s.to(dtype) for s in pair) for pair in data.lstm_states)
    )
    observations = data.observations.to(dtype)
    starts = data.episode_starts.to(dtype)
    return policy.evaluate_actions(observations, data.actions.long().flatten(), states, starts)


def loss(policy: nn.Module, data: Any) -> Tensor:
    values, log_prob, entropy = judge(policy, data)
    advantages = data.advantages[:, None] if data.advantages.dim() < values.dim() else 1
    return (values.square() - log_prob[:, None] * advantages).mean() - 0.01 * entropy.mean()


@torch.no_grad()
def test_evaluation(ours: nn.Module, torchs: nn.Module, data: Any) -> None:
    assert_same_outputs(ours, torchs, lambda policy: judge(policy, data), within=1e-6)


@pytest.mark.parametrize("policy", [MlpLstmPolicy, WithResets])
def test_learning(policy: type) -> None:
    """Three rounds of playing and learning end with the same weights; each round plays with the
    weights of the round before."""
    theirs, mine = agent(), agent(policy)
    assert len(fastrnn.replace_(mine.policy).replaced) == 2
    for each in (theirs, mine):
        each.set_random_seed(0)
        each.learn(3 * STEPS * ENVIRONMENTS)
    played = [each.rollout_buffer.observations for each in (mine, theirs)]
    assert_same(*played, within=0)
    assert_same(mine.policy.state_dict(), theirs.policy.state_dict(), 1e-4)


def test_gradients(ours: nn.Module, torchs: nn.Module, data: Any) -> None:
    assert_same_gradients(ours, torchs, lambda policy: loss(policy, data), within=1e-5)


@torch.no_grad()
def test_checkpoints_and_restore(
    ours: nn.Module, torchs: nn.Module, learnt: RecurrentPPO, data: Any, tmp_path: Path
) -> None:
    def run(policy: nn.Module) -> tuple[Tensor, ...]:
        return judge(policy, data)

    assert_checkpoints_pass(ours, torchs, run)
    assert_restores(ours, torchs, run)

    # The client's own archive, saved and loaded both ways.
    learnt.save(tmp_path / "theirs")
    mine = agent()
    fastrnn.replace_(mine.policy)
    mine.set_parameters(tmp_path / "theirs")
    assert_same(judge(mine.policy, data), judge(torchs, data), 1e-6)
    mine.save(tmp_path / "ours")
    loaded = RecurrentPPO.load(tmp_path / "ours", device="cpu")
    assert kinds(loaded.policy) == kinds(torchs)
    assert_same(judge(loaded.policy, data), judge(torchs, data), 1e-6)


def test_playing(ours: nn.Module, torchs: nn.Module) -> None:
    environment = make_vec_env(Recall, ENVIRONMENTS, seed=1)
    observation, starts = environment.reset(), np.ones(ENVIRONMENTS, bool)
    states = [None, None]
    for _ in range(40):
        both = [
            policy.predict(observation, state, starts, deterministic=True)
            for policy, state in zip((ours, torchs), states, strict=True)
        ]
        assert (both[0][0] == both[1][0]).all()
        states = [state for _, state in both]
        assert_same(*states, within=1e-5)
        observation, _, starts, _ = environment.step(both[0][0])


def test_times(ours: nn.Module, torchs: nn.Module, data: Any, ratio: Ratio) -> None:
    resetting = replaced(torchs)
    resetting._process_sequence = WithResets._process_sequence
    observation = torch.randn(ENVIRONMENTS, 3)
    zeros = torch.zeros(1, ENVIRONMENTS, 256)
    states = type(data.lstm_states)((zeros, zeros), (zeros, zeros))
    starts = torch.zeros(ENVIRONMENTS)

    def play(policy: nn.Module) -> Any:
        return policy(observation, states, starts, deterministic=True)

    ratio(
        CLIENT,
        f"a step of {ENVIRONMENTS} environments",
        lambda: play(torchs),
        lambda: play(ours),
        within=1e-5,
    )

    def learn(policy: nn.Module) -> Any:
        return torch.autograd.grad(loss(policy, data), list(policy.parameters()))

    for call, policy in (("", ours), ("; ours with resets=", resetting)):
        ratio(
            CLIENT,
            f"gradients, a batch of 128 steps{call}",
            lambda: learn(torchs),
            lambda policy=policy: learn(policy),
            within=1e-5,
            grad=True,
        )

    agents = {
        name: agent(WithResets if name == "resets" else MlpLstmPolicy)
        for name in ("torchs", "ours", "resets")
    }
    fastrnn.replace_(agents["ours"].policy)
    fastrnn.replace_(agents["resets"].policy)
    start = copy.deepcopy(agents["torchs"].get_parameters())

    def play_and_learn(name: str) -> Any:
        # Each call starts from the same state, so that results agree and the work is equal.
        agents[name].set_parameters(copy.deepcopy(start))
        agents[name].set_random_seed(0)
        agents[name].learn(STEPS * ENVIRONMENTS)
        return dict(agents[name].policy.state_dict())

    for call, name in (("", "ours"), ("; ours with resets=", "resets")):
        ratio(
            CLIENT,
            f"a round of playing and learning, {STEPS}×{ENVIRONMENTS} steps{call}",
            lambda: play_and_learn("torchs"),
            lambda name=name: play_and_learn(name),
            within=1e-4,
            grad=True,
        )
