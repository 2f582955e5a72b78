"""Fully connected CRF with Gaussian edge potentials: class probabilities that follow the colours of the image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.errors import InputError

Filter = Callable[[Tensor], Tensor]

PROBABILITY_FLOOR = 1e-5  # as pydensecrf's unary_from_softmax
# "auto" takes the grid for more: at 56 x 56 pixels it is several times faster.
EXACT_PIXELS = 32 * 32
KERNEL_NUMBERS = 2**24  # entries of kernel matrices kept at a time (more are slower); the rest is computed anew
GRID_PIXELS = 2**18  # pixels whose corners are kept at a time: about 100 MiB
TABLE_NUMBERS = 2**26  # entries of the grid that are filtered at a time
# Cells of colour of 0.8 would halve the error, by half as much time again.
SPACE_CELL, COLOUR_CELL = 0.6, 1.0  # width of the cells in standard deviations, at most
SPACE_CUTOFF = 1e-2  # of the eigenvalues of the kernels along an axis of place, by the largest; the rest is left out
COLOUR_CUTOFF = 1e-2  # of the kernel between cells of colour; smaller weights are left out
COLOUR_REACH = 2  # cells to either side along each axis of colour; 3 away the kernel is about the cutoff or below
SMALLEST_COLOUR_STD = 1e-3  # of the grid, whose cells of colour are numbered in one int64
RANGE_TOLERANCE = 0.1  # interpolation overshoots; other scalings (0..255, mean 0) do so by far more


@torch.no_grad()
def dense_crf(
    probabilities: Tensor,
    images: Tensor,
    *,
    gaussian_std: float = 15,
    gaussian_weight: float = 30,
    bilateral_std: float = 10,
    colour_std: float = 20 / 255,
    bilateral_weight: float = 50,
    iterations: int = 5,
    bilateral: Literal["auto", "exact", "grid"] = "auto",
) -> Tensor:
    r"""Mean-field inference of the fully connected CRF with Potts compatibility.

    .. math::
        Q^{t+1}_i(c) \propto \exp\Big( \log p_i(c) + \sum_m w_m \sum_j \frac{k_m(i,j)}{\sqrt{d_m(i)\, d_m(j)}}
        Q^t_j(c) \Big), \qquad d_m(i) = \sum_j k_m(i,j), \quad Q^0 = p

    with :math:`k_1 = \exp(-|x_i-x_j|^2 / 2\sigma_1^2)` and
    :math:`k_2 = \exp(-|x_i-x_j|^2 / 2\sigma_2^2 - |I_i-I_j|^2 / 2\sigma_3^2)`, x the place of a pixel in px and I its
    colour. This is ``pydensecrf`` with ``addPairwiseGaussian(sxy=15, compat=30)``, ``addPairwiseBilateral(sxy=10,
    srgb=20, compat=50)`` and 5 iterations: its kernels are normalised symmetrically (NORMALIZE_SYMMETRIC), and j runs
    over all pixels, i itself included. Its filters are coarser: it approximates both kernels on the permutohedral
    lattice of Adams et al. 2010, here :math:`k_1` is exact, and :math:`k_2` is exact or nearly so.

    ``bilateral="exact"`` multiplies with the kernel matrix, in time quadratic in the pixels. ``"grid"`` interpolates
    linearly from pixels to a grid over place and colour and back, in time and memory linear in the pixels: dense in
    place, but with only those cells of colour that the image has. Both interpolations widen the kernel, by the variance
    :math:`2 f (1 - f)` along an axis for pixels at the fraction f of a cell; the kernel between the cells is narrower
    by its mean, without which many more pixels get another class. ``"auto"`` is exact up to 32 x 32 pixels.

    Krähenbühl and Koltun, Efficient inference in fully connected CRFs with Gaussian edge potentials, NIPS 2011,
    algorithm 1 and Eq. 3.

    Args:
        probabilities: (B,C,H,W), 0 or more, of any sum over the classes; divided by it, then raised to at least 1e-5.
        images: (B,3,H,W) in [0,1].
        gaussian_std: :math:`\sigma_1`, px.
        gaussian_weight: :math:`w_1`, 0 or more.
        bilateral_std: :math:`\sigma_2`, px.
        colour_std: :math:`\sigma_3`, in the units of the images.
        bilateral_weight: :math:`w_2`, 0 or more.
        iterations: of the mean field, 0 or more; 0 returns the probabilities, divided and raised as above.
        bilateral: how the second kernel is applied.

    Returns:
        (B,C,H,W) in the type and on the device of the probabilities, of sum 1 over the classes. Computed in float64
        for float64, else in float32; without gradient. Images of a batch do not influence each other.

    Raises:
        InputError: shapes or devices that do not fit, values outside their ranges or not finite.

    Example:
        >>> images = torch.zeros(1, 3, 8, 8)
        >>> images[..., 4:] = 1
        >>> probabilities = torch.stack([1 - images[:, 0], images[:, 0]], 1) * 0.2 + 0.4
        >>> probabilities[:, :, 3, 1] = torch.tensor([0.1, 0.9])  # a speck in the left half
        >>> dense_crf(probabilities, images).argmax(1)[0, 3].tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """
    _check_tensors(probabilities, images)
    _check_numbers(gaussian_std=gaussian_std, bilateral_std=bilateral_std, colour_std=colour_std)
    _check_numbers(zero=True, gaussian_weight=gaussian_weight, bilateral_weight=bilateral_weight, iterations=iterations)
    pixels = images[0, 0].numel()
    exact = _is_exact(bilateral, pixels, colour_std)
    together = max(1, KERNEL_NUMBERS // pixels**2 if exact else GRID_PIXELS // pixels)
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    found = []
    with torch.autocast(images.device.type, enabled=False):  # sums over thousands of pixels need their digits
        for part, pictures in zip(
            torch.split(probabilities, together), torch.split(images.to(dtype), together), strict=True
        ):
            kernels = []
            if gaussian_weight:
                kernels.append((gaussian_weight, _normalised(_gaussian(pictures, gaussian_std), pictures)))
            if bilateral_weight:
                filtered = (_exact if exact else _grid)(pictures, bilateral_std, colour_std)
                kernels.append((bilateral_weight, _normalised(filtered, pictures)))
            found.append(_mean_field(part.to(dtype), kernels, iterations))
    return torch.cat(found).to(probabilities.dtype)


def _mean_field(probabilities: Tensor, kernels: list[tuple[float, Filter]], iterations: int) -> Tensor:
    # by the largest first: the sum of huge ones is not finite
    scaled = probabilities / probabilities.amax(1, keepdim=True).clamp_min(torch.finfo(probabilities.dtype).tiny)
    shares = scaled / scaled.sum(1, keepdim=True).clamp_min(torch.finfo(probabilities.dtype).tiny)
    log_unary = shares.clamp_min(PROBABILITY_FLOOR).log()
    found = log_unary.softmax(1)
    for _ in range(iterations):
        message = log_unary.clone()
        for weight, filtered in kernels:
            message.add_(filtered(found), alpha=weight)
        found = message.softmax(1)
    return found


def _normalised(kernel: Filter, images: Tensor) -> Filter:
    """D^-1/2 K D^-1/2, D the sums of the rows of K."""
    scale = kernel(torch.ones_like(images[:, :1])).rsqrt()
    return lambda values: scale * kernel(scale * values)


def _bell(number: int, variance: float, like: Tensor) -> Tensor:
    """(number,number) matrix exp(-(i-j)^2 / 2 variance)."""
    place = torch.arange(number, dtype=like.dtype, device=like.device)
    return torch.exp((place[:, None] - place) ** 2 / (-2 * variance))


def _gaussian(images: Tensor, std: float) -> Filter:
    rows, columns = (_bell(number, std**2, images) for number in images.shape[2:])
    # many products with one matrix are quick as one large product: the rows take the place of the columns for it
    return lambda values: ((values @ columns).mT.contiguous() @ rows).mT


def _exact(images: Tensor, std: float, colour_std: float) -> Filter:
    """The bilateral kernel as a matrix, in chunks of rows where it is too large to keep."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, dtype=images.dtype, device=images.device)[:, None].expand(batch, 1, height, width)
    columns = torch.arange(width, dtype=images.dtype, device=images.device).expand(batch, 1, height, width)
    features = torch.cat([rows / std, columns / std, images / colour_std], 1).flatten(2).mT.contiguous()  # (B,N,5)
    pixels = height * width
    pieces = torch.split(features, max(1, KERNEL_NUMBERS // (batch * pixels)), 1)

    def kernel(piece: Tensor) -> Tensor:
        # the quicker way by products would lose half of the digits
        distance = torch.cdist(piece, features, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.square_().mul_(-0.5).exp_()

    kept = [kernel(piece) for piece in pieces] if len(pieces) == 1 else None

    def filtered(values: Tensor) -> Tensor:
        vectors = values.flatten(2).mT
        products = [matrix @ vectors for matrix in kept or map(kernel, pieces)]
        return torch.cat(products, 1).mT.reshape(values.shape)

    return filtered


class _Axis(NamedTuple):
    """Cells along one side of the images.

    Args:
        corners: (2,n) int64, the grid points before and after each pixel.
        shares: (2,n) what each gets of it, of sum 1.
        root: (G,r) matrix L of the kernel L L^T between the grid points; r is smaller than G, as the kernel is smooth.
    """

    corners: Tensor
    shares: Tensor
    root: Tensor


def _axis(number: int, std: float, like: Tensor) -> _Axis:
    """The first and last grid point lie on the first and last pixel, so flipped images have flipped grids."""
    cells = math.ceil((number - 1) / max(1.0, SPACE_CELL * std))  # not finer than the pixels
    pitch = cells / max(1, number - 1)
    place = torch.arange(number, dtype=torch.float64) * pitch
    before = place.floor().clamp_max(max(0, cells - 1))
    after = place - before
    corners = torch.stack([before, (before + 1).clamp_max(cells)]).long().to(like.device)
    variance = (std * pitch) ** 2 - float(2 * (after * (1 - after)).mean())
    values, vectors = torch.linalg.eigh(_bell(cells + 1, variance if cells else 1.0, place))
    kept = values > SPACE_CUTOFF * values[-1]
    root = vectors[:, kept] * values[kept].sqrt()
    return _Axis(corners, torch.stack([1 - after, after]).to(like), root.to(like))


class _Colours(NamedTuple):
    """Cells of colour that the images have.

    Args:
        corners: (8,B,N) int64, the grid points around the colour of each pixel, numbered through all images.
        shares: (8,B,N) what each gets of it, of sum 1.
        blur: (K,K) sparse kernel between the grid points, 0 between those of different images.
        number: K.
    """

    corners: Tensor
    shares: Tensor
    blur: Tensor
    number: int


def _offsets(least: int, most: int, device: torch.device) -> Tensor:
    """(M,3) all steps along the axes of colour."""
    steps = torch.arange(least, most + 1, device=device)
    return torch.cartesian_prod(steps, steps, steps)


def _colours(images: Tensor, std: float) -> _Colours:
    place = (images.flatten(2) / (COLOUR_CELL * std)).transpose(0, 1)  # (3,B,N)
    before = place.floor()
    after = place - before
    cell = before.long()
    cell = cell - cell.amin((1, 2), keepdim=True) + COLOUR_REACH
    sides = cell.amax((1, 2)) + 2 + COLOUR_REACH  # room to either side, so that steps never reach another row or image
    strides = torch.stack([sides[1] * sides[2], sides[2], torch.ones_like(sides[2])])
    image = torch.arange(len(images), device=images.device)[:, None] * sides.prod()
    keys, own = torch.unique((cell * strides[:, None, None]).sum(0) + image, return_inverse=True)
    steps = _offsets(0, 1, images.device)
    around = keys + (steps * strides).sum(1)[:, None]  # (8,U)
    points, corners = torch.unique(around, return_inverse=True)
    parts = torch.where(steps.bool()[:, :, None, None], after, 1 - after)  # (8,3,B,N)
    variance = 1 / COLOUR_CELL**2 - 2 * (after * (1 - after)).mean(2)  # (3,B)
    blur = _colour_blur(points, strides, variance[:, points // sides.prod()])
    return _Colours(corners[:, own], parts.prod(1), blur, len(points))


def _colour_blur(points: Tensor, strides: Tensor, variance: Tensor) -> Tensor:
    """(K,K) sparse Gaussian of the variances (3,K) of each point, between points at most COLOUR_REACH cells apart."""
    number, pairs, weights = len(points), [], []
    for step in _offsets(-COLOUR_REACH, COLOUR_REACH, points.device):
        weight = torch.exp(-0.5 * (step[:, None] ** 2 / variance).sum(0))
        key = points + (step * strides).sum()
        place = torch.searchsorted(points, key).clamp_max(number - 1)
        near = ((points[place] == key) & (weight > COLOUR_CUTOFF)).nonzero()[:, 0]
        pairs.append(torch.stack([near, place[near]]))
        weights.append(weight[near])
    return torch.sparse_coo_tensor(
        torch.cat(pairs, 1), torch.cat(weights), (number, number), check_invariants=False
    ).coalesce()


def _grid(images: Tensor, std: float, colour_std: float) -> Filter:
    """The bilateral kernel by way of a grid, cells of colour (K) x rows (Y) x columns (X)."""
    batch, _, height, width = images.shape
    rows, columns = (_axis(number, std, images) for number in (height, width))
    colours = _colours(images, colour_std)
    y, x = len(rows.root), len(columns.root)
    space = rows.corners[:, None, :, None] * x + columns.corners[:, None, :]  # (2,2,H,W)
    shares = rows.shares[:, None, :, None] * columns.shares[:, None, :]
    index = (colours.corners[:, None] * (y * x) + space.reshape(1, 4, 1, -1)).reshape(32, -1)  # of B N pixels
    weight = (colours.shares[:, None] * shares.reshape(1, 4, 1, -1)).reshape(32, -1)
    bags, bag_weights = index.mT.contiguous(), weight.mT.contiguous()

    def some(values: Tensor) -> Tensor:
        pixels = values.transpose(0, 1).flatten(1)  # (C,B N)
        table = pixels.new_zeros(len(pixels), colours.number * y * x)
        for row, each in zip(table, pixels, strict=True):  # all classes at once are no quicker, and 32 C B N numbers
            row.scatter_add_(0, index.flatten(), (each * weight).flatten())
        table = _blurred(table.view(len(pixels), -1, y, x), rows.root, columns.root, colours.blur)
        table = table.view(len(pixels), -1).mT.contiguous()
        found = F.embedding_bag(bags, table, mode="sum", per_sample_weights=bag_weights)
        return found.mT.reshape(-1, batch, height, width).transpose(0, 1)

    together = max(1, TABLE_NUMBERS // (colours.number * y * x))
    return lambda values: torch.cat([some(part) for part in torch.split(values, together, 1)], 1)


def _blurred(table: Tensor, rows: Tensor, columns: Tensor, colours: Tensor) -> Tensor:
    """(C,K,Y,X) table times the kernels along rows, columns and colours; that of colours where the rest is smallest."""
    number = table.shape[1]
    small = (table @ columns).mT.contiguous() @ rows  # (C,K,s,r)
    small = torch.stack([(colours @ each.reshape(number, -1)).view_as(each) for each in small])
    return (small @ rows.mT).mT.contiguous() @ columns.mT


def _is_exact(bilateral: str, pixels: int, colour_std: float) -> bool:
    if bilateral not in ("auto", "exact", "grid"):
        raise InputError(f"bilateral {bilateral!r}", "is not a way to filter", "use 'auto', 'exact' or 'grid'")
    exact = bilateral == "exact" or (bilateral == "auto" and pixels <= EXACT_PIXELS)
    if not exact and colour_std < SMALLEST_COLOUR_STD:
        fix = "use a larger one, or bilateral='exact'"
        raise InputError(f"colour_std {colour_std}", f"is below {SMALLEST_COLOUR_STD}, too fine for the grid", fix)
    return exact


def _check_numbers(*, zero: bool = False, **numbers: float) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            rule = "is below 0 or not finite" if zero else "is not above 0 or not finite"
            raise InputError(f"{name} {value}", rule, f"use {'0 or more' if zero else 'a number above 0'}")


def _check_tensors(probabilities: Tensor, images: Tensor) -> None:
    shape, others = tuple(probabilities.shape), tuple(images.shape)
    if len(shape) != 4 or 0 in shape:
        raise InputError(f"probabilities of shape {shape}", "are not (B, C, H, W)", "give none of length 0")
    if others != (shape[0], 3, *shape[2:]):
        fix = f"give (B, 3, H, W) images of the size of the probabilities, {(shape[0], 3, *shape[2:])}"
        raise InputError(f"images of shape {others}", f"do not fit probabilities of shape {shape}", fix)
    if probabilities.device != images.device:
        fix = "move one of them"
        raise InputError(f"images on {images.device}", f"are not with the probabilities, {probabilities.device}", fix)
    for name, values in (("probabilities", probabilities), ("images", images)):
        if not values.is_floating_point():
            raise InputError(f"{name} of type {values.dtype}", "are not floating point", "convert and scale them")
        if not bool(values.isfinite().all()):
            place = tuple((~values.isfinite()).nonzero()[0].tolist())
            raise InputError(f"{name} at {place}", "are not finite", "look for what made them so")
    if float(probabilities.min()) < 0:
        rule = "are below 0, so they are no probabilities"
        raise InputError(f"probabilities of {float(probabilities.min()):g}", rule, "give the softmax of the scores")
    least, most = float(images.min()), float(images.max())
    if least < -RANGE_TOLERANCE or most > 1 + RANGE_TOLERANCE:
        fix = "divide 0..255 by 255, or undo the normalisation"
        raise InputError(f"images in [{least:g}, {most:g}]", "are far outside [0, 1]", fix)
