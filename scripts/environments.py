"""Copies of a task of popgym side by side, for train_policy.py."""

import sys

import numpy as np

try:
    import popgym.envs
except ImportError as e:
    sys.exit(f'{e.name} is missing: pip install "gru-any[rl]", in a clone ".[rl]"')

TASKS = [f"{task}{how}" for task in ("RepeatPrevious", "RepeatFirst")
         for how in ("Easy", "Medium", "Hard")]  # fmt: skip


class Environments:
    """N copies of a task; an episode that ends is followed by the next one.

    An episode is decided by the seed, the number of its copy, its own number and the actions. So
    these are all that a checkpoint holds, and `restore` plays the present episodes again.

    numbers: of the copies, of which others may be in other processes.
    """

    def __init__(self, task: str, numbers: range, seed: int) -> None:
        self.numbers, count = numbers, len(numbers)
        self.copies = [getattr(popgym.envs, task)() for _ in numbers]
        self.size = int(self.copies[0].observation_space.n)  # I
        self.choices = int(self.copies[0].action_space.n)  # A
        self.seed = seed
        self.observed = np.zeros(count, int)
        self.episodes = np.zeros(count, int)  # the number of each copy's present one,
        self.actions: list[list[int]] = [[] for _ in range(count)]  # what was done in it,
        self.sums = [0.0] * count  # and its rewards so far
        self.finished: list[float] = []  # the returns of episodes that have ended
        for i in range(count):
            self._begin(i)

    def _begin(self, i: int) -> None:
        which = [self.seed, self.numbers[i], int(self.episodes[i])]
        seed = np.random.SeedSequence(which).generate_state(1)[0]
        self.observed[i], _ = self.copies[i].reset(seed=int(seed))
        self.actions[i], self.sums[i] = [], 0.0

    def _step(self, i: int, action: int) -> tuple[float, bool]:
        self.observed[i], reward, ended, cut, _ = self.copies[i].step(action)
        self.actions[i].append(action)
        self.sums[i] += reward
        return reward, ended or cut  # these tasks are never cut

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rewards (N,), and which episodes have ended (N,)."""
        rewards, done = np.zeros(len(actions), "float32"), np.zeros(len(actions), bool)
        for i, action in enumerate(actions.tolist()):
            rewards[i], done[i] = self._step(i, action)
            if done[i]:
                self.finished.append(self.sums[i])
                self.episodes[i] += 1
                self._begin(i)
        return rewards, done

    def look(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the observations, one-hot (N, I), and which of them begin an episode (N,)."""
        begins = np.array([not actions for actions in self.actions])
        return np.eye(self.size, dtype="float32")[self.observed], begins

    def saved(self) -> dict[str, np.ndarray]:
        """Return the arguments of `restore`: the episodes, and their actions, padded by -1."""
        longest = max(map(len, self.actions))
        rows = [actions + [-1] * (longest - len(actions)) for actions in self.actions]
        return {"episodes": self.episodes, "actions": np.array(rows, int)}

    def restore(self, episodes: np.ndarray, actions: np.ndarray) -> None:
        """Go back to the moment of `saved`."""
        self.episodes = episodes.copy()
        for i, row in enumerate(actions.tolist()):
            self._begin(i)
            for action in row:
                if action >= 0:
                    self._step(i, action)


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join what several copies have `saved` into one."""
    longest = max(part["actions"].shape[1] for part in parts)
    actions = [
        np.pad(rows, ((0, 0), (0, longest - rows.shape[1])), constant_values=-1)
        for rows in (part["actions"] for part in parts)
    ]
    return {
        "episodes": np.concatenate([part["episodes"] for part in parts]),
        "actions": np.concatenate(actions),
    }
