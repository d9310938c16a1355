"""The base class of all networks: what training, inference, calibration and export need from one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from recontrast.models.backbone import Backbone

Views = Literal["both", "trained", "frozen"]


class Network(nn.Module):
    """Base class of the networks: images in, point distances out.

    A subclass sets the attributes and implements `config`, `forward` and `distances`. A network that is trained by
    steps also has trainable parameters; one that is fitted in one pass is an `OnePassNetwork`.

    Attributes:
        encoder: Backbone.
        frozen: Second, frozen encoder, or None.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it, in pixels.
        align_corners: Whether distances are upsampled with aligned corners.
        has_bounded_distances: Whether no distance exceeds `max_distance`.
        fits_inside: Whether `OnePassNetwork.observe` takes the points inside a region of interest.
        fitted_buffers: Names of buffers that take the shape of a loaded state dict.
    """

    encoder: Backbone
    frozen: Backbone | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stride: int
    align_corners: bool = True
    has_bounded_distances: bool = True
    fits_inside: bool = False
    fitted_buffers: ClassVar[tuple[str, ...]] = ()

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights.

        ``Class(**config, weights="random")`` builds the same network, ready to load a state dict.
        """
        raise NotImplementedError

    @property
    def constant_encoder(self) -> Backbone | None:
        """Encoder whose features do not change in training and can be cached; None if there is none."""
        return next((e for e in (self.frozen, self.encoder) if e is not None and e.frozen), None)

    def constant_features(self, images: Tensor) -> list[Tensor]:
        """Compute what `forward` takes as ``frozen_features`` and does not change in training.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Features of `constant_encoder`, one tensor (N, ...) for each of its levels.

        Raises:
            ValueError: If all encoders are trained.
        """
        if self.constant_encoder is None:
            raise ValueError(f"{type(self).__name__}: constant_features: wanted a frozen encoder, got none")
        return self.constant_encoder(images)

    @property
    def max_distance(self) -> float:
        """Upper end of the scale of distances. Maps that are stored as integers are clipped there."""
        raise NotImplementedError

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Compute the distance of each point from what good images have there.

        Args:
            images: Normalised images (N, 3, H, W), in the dtype of the weights.
            views: Encoders whose features serve as targets, for networks with two.
            exportable: Whether to use only operators of PyTorch without loops over the batch, for ``torch.export``.

        Returns:
            distances: Distances (N, h, w), float32, one for each of `map_sizes`, group by group.
            scores: The network's own image scores, (N,), float32; None if it has none.

        Raises:
            ValueError: If the images have another shape, or the network is not fitted.
        """
        raise NotImplementedError

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of each level of distances, fine to coarse, for images of ``size``, an int or (h, w).

        Raises:
            ValueError: If height or width is not a multiple of ``stride``.
        """
        height, width = self.check_size(size)
        return [(height // stride, width // stride) for stride in self.encoder.strides]

    def fix_size(self, size: tuple[int, int]) -> "Network":
        """Fix the image size, so that the graph of an exported file resamples no position embeddings.

        Args:
            size: Height and width of images in pixels.

        Returns:
            The network itself.
        """
        for encoder in (self.encoder, self.frozen):
            if encoder is not None:
                encoder.fix_size(size)
        return self

    def check_size(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Return height and width of ``size`` if the network takes images of this size.

        Args:
            size: Size of images in pixels, an int or (h, w).

        Returns:
            Height and width in pixels.

        Raises:
            ValueError: If height or width is not a multiple of ``stride``.
        """
        height, width = (size, size) if isinstance(size, int) else size
        if height < self.stride or width < self.stride or height % self.stride or width % self.stride:
            wanted = f"height and width of at least {self.stride} px and multiples of it"
            raise ValueError(
                f"{type(self).__name__}: images: wanted {wanted} (stride of {self.encoder.name}), got {height}x{width}"
            )
        return height, width

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless ``images`` has shape (N, 3, H, W) and a size that the network takes."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{type(self).__name__}: images: wanted (N, 3, H, W), got {tuple(images.shape)}")
        self.map_sizes((images.shape[2], images.shape[3]))

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the trained encoder's parameters, which use the small learning rate."""
        return (p for p in self.encoder.parameters() if p.requires_grad)

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all other trained parameters, which use the large learning rate."""
        encoders = {id(p) for module in (self.encoder, self.frozen) if module is not None for p in module.parameters()}
        return (p for p in self.parameters() if p.requires_grad and id(p) not in encoders)

    def cast(self, dtype: torch.dtype) -> "Network":
        """Convert the weights for inference; what was fitted keeps its dtype.

        Args:
            dtype: Floating-point dtype.

        Returns:
            The network itself.
        """
        return self.to(dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Give the fitted buffers the shapes in ``state_dict`` where only their first dimension differs."""
        for name in self.fitted_buffers:
            buffer, value = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.ndim == buffer.ndim and value.shape[1:] == buffer.shape[1:]:
                setattr(self, name, torch.empty(value.shape, dtype=buffer.dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class OnePassNetwork(Network):
    """Base class of networks that are fitted in one pass over the good images, with one frozen encoder.

    A subclass implements `observe`, and sets the buffers named in ``fitted_buffers``. See `Network` for the attributes.
    """

    align_corners: bool = False  # as the authors of PatchCore and PaDiM do
    has_bounded_distances: bool = False

    def observe(self, images: Tensor) -> None:
        """Collect what one pass over the good images estimates.

        A network with ``fits_inside`` also takes ``inside``, whether each pixel is in the region of interest, (N, H, W)
        bool of any size, and leaves out the points outside. Another one learns the whole image, and only its map and
        score have the region.

        Args:
            images: Normalised images (N, 3, H, W), of one size in all calls.
        """
        raise NotImplementedError

    def resume(self, count: int) -> list[int]:
        """Go on from a fit, so that `observe` adds images to those that the network was fitted to.

        Args:
            count: Number of images that it was fitted to.

        Returns:
            Positions of the images, from 0 to ``count`` - 1, that `observe_again` needs; none by default.
        """
        return []

    def observe_again(self, images: Tensor) -> None:
        """Take the images that `resume` named, in its order; by default none.

        Args:
            images: Normalised images (N, 3, H, W).
        """

    def cast(self, dtype: torch.dtype) -> "OnePassNetwork":
        """Convert the encoder, see `Network.cast`; what was fitted keeps its dtype.

        Args:
            dtype: Floating-point dtype.

        Returns:
            The network itself.
        """
        self.encoder.to(dtype)
        return self


def check_choice(owner: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError if the value of an argument is not one of the allowed ones.

    Args:
        owner: Name of the class, for the message.
        argument: Name of the argument.
        value: Given value.
        allowed: Allowed values.

    Raises:
        ValueError: If ``value`` is not among ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{owner}: {argument}: wanted {' or '.join(map(repr, allowed))}, got {value!r}")


def disable_autocast(images: Tensor, exportable: bool) -> AbstractContextManager[Any]:
    """Return a context without autocast, or one that does nothing if it is traced by ``torch.export``.

    Args:
        images: Tensor on the device of the computation.
        exportable: Whether the computation is traced.

    Returns:
        The context.
    """
    return nullcontext() if exportable else torch.autocast(images.device.type, enabled=False)
