"""Teaches a paddle to catch a falling ball, by proximal policy optimization.

python examples/ppo.py
"""

import argparse

import keras
import numpy as np
from keras import layers, ops

import polus

ROWS, COLUMNS, GAMES = 7, 5, 64


class Catch:
    """Games of one ball each, which falls a row per move; the reward of 1 or -1 comes at the end.

    Args:
        seed: The seed of the columns in which balls start.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        self.row = 0
        self.ball = self.generator.integers(COLUMNS, size=GAMES)
        self.paddle = np.full(GAMES, COLUMNS // 2)
        return self.observation()

    def observation(self) -> np.ndarray:
        height = np.full(GAMES, self.row / ROWS)
        parts = [np.eye(COLUMNS)[self.ball], np.eye(COLUMNS)[self.paddle], height[:, None]]
        return np.concatenate(parts, -1).astype("float32")

    def move(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.row += 1
        self.paddle = np.clip(self.paddle + actions - 1, 0, COLUMNS - 1)
        caught = np.where(self.paddle == self.ball, 1.0, -1.0)
        return self.observation(), caught if self.row == ROWS - 1 else np.zeros(GAMES)


class PPO(polus.BaseTrainer):
    """One update of an actor and a critic (Schulman et al., arXiv:1707.06347).

    Args:
        clip: How far the probability of an action may move from that of the policy that played.
        kwargs: The other arguments of `BaseTrainer`.
    """

    def __init__(self, clip: float = 0.2, **kwargs) -> None:
        super().__init__(**kwargs)
        self.clip = clip
        self.seed = keras.random.SeedGenerator(0)

    @polus.function
    def act(self, observations):
        """Returns an action for each game, and the logarithm of its probability."""
        log_probs = ops.log_softmax(self.model.actor(observations))
        actions = keras.random.categorical(log_probs, 1, seed=self.seed)[:, 0]
        return actions, _chosen(log_probs, actions)

    def train_step(self, observations, actions, old_log_probs, returns):
        values = self.model.critic(observations)[:, 0]
        advantages = ops.stop_gradient(returns - values)
        advantages = (advantages - ops.mean(advantages)) / (ops.std(advantages) + 1e-6)

        def losses():
            log_probs = ops.log_softmax(self.model.actor(observations))
            ratio = ops.exp(_chosen(log_probs, actions) - old_log_probs)
            clipped = ops.clip(ratio, 1 - self.clip, 1 + self.clip)
            entropy = -ops.mean(ops.sum(ops.exp(log_probs) * log_probs, -1))
            gain = ops.mean(ops.minimum(ratio * advantages, clipped * advantages))
            error = ops.mean((self.model.critic(observations)[:, 0] - returns) ** 2)
            kl = ops.mean(old_log_probs - _chosen(log_probs, actions))
            total = -gain + error - 0.01 * entropy
            return {"loss": total, "critic": error, "entropy": entropy, "kl": kl}

        return self.minimize(losses, self.trainable_weights)


def _chosen(log_probs, actions):
    return ops.sum(log_probs * ops.one_hot(actions, 3), -1)


def play(trainer: PPO, environment: Catch) -> tuple[list[np.ndarray], float]:
    """Plays a game on each board. Returns the arrays to train on, and the mean reward."""
    moves, observations = [], environment.reset()
    for _ in range(ROWS - 1):
        actions, log_probs = map(ops.convert_to_numpy, trainer.act(observations))
        following, rewards = environment.move(actions)
        moves.append((observations, actions, log_probs))
        observations = following
    arrays = [np.concatenate(parts) for parts in zip(*moves, strict=True)]
    returns = np.tile(rewards, ROWS - 1).astype("float32")  # undiscounted, and all at the end
    return [*arrays, returns], float(rewards.mean())


def main(epochs: int = 100, passes: int = 4) -> float:
    """Returns the mean reward of the last games: 1 if every ball is caught."""
    keras.utils.set_random_seed(0)

    def dense(outputs):
        return keras.Sequential(
            [
                keras.Input((2 * COLUMNS + 1,)),
                layers.Dense(64, activation="tanh"),
                layers.Dense(outputs),
            ]
        )

    trainer = PPO(
        model={"actor": dense(3), "critic": dense(1)}, optimizer=keras.optimizers.Adam(3e-3)
    )
    environment, reward = Catch(), -1.0
    with trainer.session(callbacks=[polus.ConsoleLogCallback()]) as run:
        while run.epoch < epochs:
            batch, reward = play(trainer, environment)  # with the weights of this moment
            if reward > 0.97:
                run.stop("solved")
            for _ in range(passes):
                terms = run.step(*batch)
                if float(ops.convert_to_numpy(terms["kl"])) > 0.05:
                    break
            run.end_epoch(reward=reward)
    print(f"Mean reward {reward:.2f} after {len(run.history.epochs)} epochs of {GAMES} games")
    return reward


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    main(**vars(parser.parse_args()))
