"""Recurrent PPO without a loop over time steps: sb3-contrib's agent, with one method replaced.

The policy of sb3-contrib holds two LSTMs. An update runs them over a batch of played sequences, and
an episode may begin in any of them at any step, from a state of zeros. sb3-contrib calls the LSTM
once for each time step and sets the states to zero in between. `resets=` makes that one call, with
the same values and gradients. The task is CartPole with its velocities hidden, which an agent has
to remember positions for. It comes with gymnasium.

    python examples/recurrent_ppo.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrnn

ENVIRONMENTS, STEPS = 8, 128  # played side by side, and steps of each between two updates


def process_sequence(
    features: Tensor, states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Outputs [B*T, H] and the last states. Features [B*T, I] and episode_starts [B*T] are B
    sequences behind each other; states are two tensors [num_layers, B, H]."""
    sequences = states[0].shape[1]
    x = features.unflatten(0, (sequences, -1)).transpose(0, 1)
    starts = episode_starts.unflatten(0, (sequences, -1)).transpose(0, 1)
    output, states = lstm(x, states, resets=starts.bool())  # in place of the loop
    return output.transpose(0, 1).flatten(0, 1), states


def policies() -> dict[str, Any]:
    """sb3-contrib's policy, and the same with fastrnn's layers and the method above."""
    try:
        from sb3_contrib.ppo_recurrent.policies import MlpLstmPolicy
    except ModuleNotFoundError:
        sys.exit("this example trains an agent of sb3-contrib: pip install sb3-contrib")

    class OneCall(MlpLstmPolicy):
        _process_sequence = staticmethod(process_sequence)

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            fastrnn.replace_(self)

    return {"loop of torch.nn": MlpLstmPolicy, "one call of fastrnn": OneCall}


def agent(policy: Any) -> Any:
    import gymnasium
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    def without_velocities() -> Any:
        seen = gymnasium.spaces.Box(-5, 5, (2,))
        return gymnasium.wrappers.TransformObservation(
            gymnasium.make("CartPole-v1"), lambda state: state[[0, 2]], seen
        )

    return RecurrentPPO(
        policy,
        make_vec_env(without_velocities, ENVIRONMENTS, seed=0),
        n_steps=STEPS,
        batch_size=512,
        n_epochs=10,
        gamma=0.98,
        gae_lambda=0.9,
        learning_rate=2e-3,
        policy_kwargs={"lstm_hidden_size": 64, "net_arch": [64]},
        seed=0,
        device="cpu",
    )


def results(policy: Any, batch: Any) -> list[Tensor]:
    """Values, probabilities and entropies of a batch, and the gradients of all parameters."""
    values, log_prob, entropy = policy.evaluate_actions(
        batch.observations, batch.actions.long().flatten(), batch.lstm_states, batch.episode_starts
    )
    loss = values.square().mean() - log_prob.mean() - entropy.mean()
    found = [values, log_prob, entropy]
    return [*(t.detach() for t in found), *torch.autograd.grad(loss, list(policy.parameters()))]


def difference(theirs: Any, ours: Any) -> float:
    """The largest one between two agents with the same weights, relative to a result's largest
    number, on a batch in which episodes begin."""
    player = agent(theirs).learn(STEPS * ENVIRONMENTS)
    twin = agent(ours).policy
    twin.load_state_dict(copy.deepcopy(player.policy.state_dict()))
    batch = next(player.rollout_buffer.get(512))
    assert batch.episode_starts.any()
    pairs = list(zip(results(twin, batch), results(player.policy, batch), strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


class Outcome(NamedTuple):
    mean_return: float  # of the episodes that end last in the training; 500 is the most
    played: float  # frames per second of playing and learning
    learned: float  # frames per second of learning alone, each frame once


def train(policy: Any, frames: int) -> Outcome:
    player = agent(policy)
    update, learning = player.train, 0.0

    def timed() -> None:
        nonlocal learning
        begin = time.perf_counter()
        update()
        learning += time.perf_counter() - begin

    player.train = timed
    start = time.perf_counter()
    player.learn(frames)
    seconds = time.perf_counter() - start
    done = player.num_timesteps
    last = [episode["r"] for episode in player.ep_info_buffer]
    return Outcome(sum(last) / len(last), done / seconds, done / learning)


def main(quick: bool = False) -> tuple[float, dict[str, Outcome]]:
    """Returns the largest difference, and what each policy reached."""
    both = policies()
    error = difference(*both.values())
    print(f"largest difference of values and gradients: {error:.0e}")
    assert error < 1e-4
    outcomes = {}
    for name, policy in both.items():
        outcomes[name] = train(policy, STEPS * ENVIRONMENTS if quick else 40_000)
        reached, played, learned = outcomes[name]
        print(f"{name:20}  {played:6.0f} frames/s, learning alone {learned:6.0f}", end="")
        print(f"; return {reached:.0f} of 500")
    return error, outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of playing and learning")
    main(parser.parse_args().quick)
