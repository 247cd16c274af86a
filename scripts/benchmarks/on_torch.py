"""The recipes' layers, losses and loop on PyTorch, for compare_torch.py."""

import math
from collections.abc import Iterator
from typing import Any

import gru_any
from gru_any import GRU, Chain, Dropout, Embedding, Linear
from gru_any.train.data import Piece, ahead, cut

# the layers ---------------------------------------------------------------------------------------


def twin(chain: Chain) -> Any:
    """The layers of a chain as PyTorch's, with the same weights."""
    import torch

    made: list[Any] = []
    for layer in chain.layers:
        if isinstance(layer, GRU):
            made.append(
                torch.nn.GRU(
                    layer.input_size, layer.hidden_size, layer.num_layers,
                    dropout=layer.dropout, bidirectional=layer.settings["bidirectional"],
                )
            )  # fmt: skip
        elif isinstance(layer, Linear):
            made.append(torch.nn.Linear(layer.in_features, layer.out_features))
        elif isinstance(layer, Embedding):
            made.append(torch.nn.Embedding(*layer.params["weight"].shape))
        else:
            made.append(torch.nn.Dropout(layer.p))
        weights = {k: torch.tensor(gru_any.to_numpy(v)) for k, v in layer.params.items()}
        for name, weight in made[-1].named_parameters():
            torch.nn.init.zeros_(weight)  # bias_hh, which reset_after=False lacks
            weight.data += weights.get(name, 0)
    return torch.nn.ModuleList(made)


def back(layers: Any, chain: Chain) -> Chain:
    """The weights of PyTorch's layers in a chain of this library."""
    made: list[Any] = []
    for theirs, ours in zip(layers, chain.layers, strict=True):
        if isinstance(ours, GRU):
            made.append(GRU(**{**ours.settings, "reset_after": True, "recompute": None}))
        elif isinstance(ours, Dropout):
            made.append(Dropout(ours.p))
        else:
            made.append(ours.to("numpy"))
        made[-1].load_params({k: v.detach().numpy() for k, v in theirs.named_parameters()})
    return Chain(*made)


def run(layers: Any, x: Any, state: Any, lengths: Any) -> tuple[Any, Any]:
    """All layers, on packed sequences where there are lengths -> y, the new state."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    after: list[Any] = []
    for layer in layers:
        if not isinstance(layer, torch.nn.GRU):
            x = layer(x)
            continue
        if lengths is not None:
            x = pack_padded_sequence(x, torch.as_tensor(lengths), enforce_sorted=False)
        x, h = layer(x, None if state is None else state[len(after)])
        if lengths is not None:
            x = pad_packed_sequence(x)[0]
        after.append(h.detach())
    return x, after


# the losses ---------------------------------------------------------------------------------------


def of_symbols(y: Any, target: Any, mask: Any) -> Any:
    """One symbol a step."""
    from torch.nn import functional

    return functional.cross_entropy(y.flatten(0, 1), target.flatten())


def of_sums(y: Any, target: Any, mask: Any) -> Any:
    """One number, at the last step."""
    from torch.nn import functional

    return functional.mse_loss(y[-1], target[-1])


def of_sequences(y: Any, target: Any, mask: Any) -> Any:
    """One class a sequence, from the mean over its steps."""
    from torch.nn import functional

    kept = mask.to(y.dtype)
    return functional.cross_entropy((y * (kept / kept.sum(0))[..., None]).sum(0), target[0])


def of_keys(y: Any, target: Any, mask: Any, full: int | None) -> Any:
    """Nats per frame, or (`--by-frames`) the sum over all frames in parts of so many."""
    from torch.nn import functional

    kept = mask[..., None].to(y.dtype).expand(y.shape)
    total = functional.binary_cross_entropy_with_logits(y, target, kept, reduction="sum")
    return total / (full or mask.sum())


# the loop -----------------------------------------------------------------------------------------


def optimiser_of(made: dict[str, Any], layers: Any) -> Any:
    import torch

    ours = made["optimiser"]
    kind = getattr(torch.optim, type(ours).__name__)
    settings = {"betas": ours.betas, "eps": ours.eps, "weight_decay": ours.weight_decay}
    return kind(layers.parameters(), ours.lr, **settings, fused=True)


def pieces(made: dict[str, Any]) -> Iterator[tuple[int, Piece]]:
    """The pieces of all epochs, the next one prepared while the present one computes."""

    def all_of_them() -> Iterator[tuple[int, Piece]]:
        epoch = 0
        while True:
            for batch in made["batches"](epoch):
                for piece in cut(batch, made.get("tbptt")):
                    yield epoch, piece
            epoch += 1

    return ahead(all_of_them())


def tensor(array: Any) -> Any:
    """The array, which PyTorch wants writeable, or None."""
    import torch

    if array is None:
        return None
    return torch.as_tensor(array if array.flags.writeable else array.copy())


def at(layers: Any, x: Any, state: Any) -> Any:
    """The state after x, without dropout, as `fit` reads it."""
    import torch

    layers.eval()
    with torch.no_grad():
        _, after = run(layers, x, state, None)
    layers.train()
    return after


class Kept:
    """The weights to give back: the running average if there is one, where valid was lowest."""

    def __init__(self, layers: Any, decay: float | None, valid: Any) -> None:
        from torch.optim.swa_utils import AveragedModel

        def follow(average: Any, weight: Any, updates: Any) -> Any:
            rate = min(decay or 0.0, (1 + int(updates)) / (10 + int(updates)))  # as in `fit`
            return average.lerp(weight, 1 - rate)

        self.layers, self.valid, self.lowest = layers, valid, math.inf
        self.weights: Any = None
        self.average: Any = AveragedModel(layers, avg_fn=follow) if decay else None
        self.update()  # the first is a copy

    def update(self) -> None:
        """After a change of the weights."""
        if self.average:
            self.average.update_parameters(self.layers)

    def validate(self) -> None:
        """Ask for the loss; the weights are kept where it is the lowest."""
        if not self.valid:
            return
        layers = self.average.module if self.average else self.layers
        loss = self.valid(layers)
        if loss < self.lowest:
            self.lowest = loss
            self.weights = {k: v.clone() for k, v in layers.state_dict().items()}

    def give_back(self) -> None:
        """Put what was kept into the layers."""
        if self.weights or self.average:
            self.layers.load_state_dict(self.weights or self.average.module.state_dict())


def fit_torch(
    made: dict[str, Any], loss: Any, layers: Any, *, steps: int | None = None,
    epochs: int | None = None, valid: Any = None, validate_every: int | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """The loop of `gru_any.train.fit`."""
    import torch

    torch.manual_seed(seed)
    optimiser, state, epoch_before = optimiser_of(made, layers), None, 0
    kept = Kept(layers, made.get("average"), valid)
    layers.train()
    for step, (epoch, piece) in enumerate(pieces(made)):
        every = step % validate_every == 0 if validate_every else epoch > epoch_before
        ended = step >= (steps or math.inf) or epoch >= (epochs or math.inf)
        if step and (every or ended):
            kept.validate()
        if ended:
            break
        epoch_before = epoch
        optimiser.param_groups[0]["lr"] = made["schedule"](step)
        x, target, mask = map(tensor, piece.batch[:3])
        before = None if piece.first else state
        y, state = run(layers, x, before, piece.batch.lengths)
        optimiser.zero_grad()
        loss(y, target, mask).backward()
        if piece.advance < len(x):  # the next piece begins within this one
            state = at(layers, x[: piece.advance], before)
        torch.nn.utils.clip_grad_norm_(layers.parameters(), made["clip"])
        optimiser.step()
        kept.update()
    kept.give_back()
