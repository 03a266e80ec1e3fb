"""The planted double seesaw: tasks and domains that want different things of the same users and items.

Two options of `produce` set its strength, both 0 in the quickstart. `domain_conflict` is one less the
correlation that two domains keep, `task_conflict` one less the correlation that a task keeps with click:

- of taste: a domain and a task each turn a user's taste by an angle in planes of their own before it meets
  the item's. The turned taste is cos(angle) u + sin(angle) J u, where J is a random complex structure
  (J J = -I and J' = -J), so turning keeps lengths and the correlation with u is exactly cos(angle);
- of effects: a group's and an author's effect is blended with one that they have in this domain alone, and
  the effects of tasks follow the common one less.

There is no gate, no product of network layers and no scaling of features here: a rotation moves taste between
dimensions, which an elementwise gate cannot do.

Shapes: D domains, T tasks, K taste dimensions, G groups, W authors, M rows of one domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data import table1
from trainer.data.population import NUM_GROUPS, TASTE_DIM, draw_effects

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CONFLICT_SHARE_T = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
"""How much of task_conflict each task has, columns as table1.TASKS: click expresses taste as it is."""


@dataclass(frozen=True, slots=True)
class Seesaw:
    """What domains and tasks change; drawn from a generator of its own."""

    turn_DTKK: Floats
    """A user's taste (a row) times this is what domain d and task t see of it; orthogonal."""
    shared: float
    """Share of an effect's variance that is the same in every domain."""
    group_effect_DGT: Floats
    author_effect_DWT: Floats

    def turned(self, taste_MK: Floats, *, domain: int) -> Floats:
        """float32 [M, T, K]: the taste as each task of this domain sees it."""
        turned_MTK: Floats = np.einsum("mk,tkj->mtj", taste_MK, self.turn_DTKK[domain], optimize=True)
        return turned_MTK

    def effects(self, effect_MT: Floats, own_MT: Floats) -> Floats:
        """Blend what is the same everywhere with what this domain has of its own; variances stay."""
        blended_MT: Floats = (
            np.float32(np.sqrt(self.shared)) * effect_MT + np.float32(np.sqrt(1.0 - self.shared)) * own_MT
        )
        return blended_MT


def task_loads(loads_T: Floats, *, task_conflict: float) -> Floats:
    """How each task follows the effect that all tasks share: float32 [T]; without conflict as given."""
    less_T: Floats = loads_T * (1.0 - task_conflict * CONFLICT_SHARE_T).astype(np.float32)
    return less_T


def plant(
    rng: np.random.Generator,
    *,
    domain_conflict: float,
    task_conflict: float,
    num_authors: int,
    loads_T: Floats,
) -> Seesaw:
    """Args: domain_conflict, task_conflict: in 0..1. loads_T: of the effects that a domain has of its own."""
    domains = range(len(table1.DOMAINS))
    # Two domains turned by the same angle, each in its own planes, keep cos(angle)^2 on average.
    domain_cosine = float(np.sqrt(1.0 - domain_conflict))
    domain_DKK = [turn(rng, TASTE_DIM, cosine=domain_cosine) for _ in domains]
    cosine_T = 1.0 - task_conflict * CONFLICT_SHARE_T
    task_TKK = [turn(rng, TASTE_DIM, cosine=float(cosine)) for cosine in cosine_T]
    turns = [[of_domain @ of_task for of_task in task_TKK] for of_domain in domain_DKK]
    return Seesaw(
        turn_DTKK=np.array(turns).astype(np.float32),
        shared=1.0 - domain_conflict,
        group_effect_DGT=np.stack([draw_effects(rng, NUM_GROUPS, loads_T) for _ in domains]),
        author_effect_DWT=np.stack([draw_effects(rng, num_authors, loads_T) for _ in domains]),
    )


def turn(rng: np.random.Generator, width: int, *, cosine: float) -> npt.NDArray[np.float64]:
    """A random rotation that takes every vector to one at the same angle from it: float64 [K, K], K even."""
    basis_KK, upper_KK = np.linalg.qr(rng.standard_normal((width, width)))
    # Without this the signs follow the algorithm's convention, and turns lean to one side.
    basis_KK *= np.sign(np.diag(upper_KK))
    quarter_KK = np.kron(np.eye(width // 2), np.array([[0.0, 1.0], [-1.0, 0.0]]))
    sine = np.sqrt(max(0.0, 1.0 - cosine**2))
    turned_KK: npt.NDArray[np.float64] = cosine * np.eye(width) + sine * (basis_KK @ quarter_KK @ basis_KK.T)
    return turned_KK
