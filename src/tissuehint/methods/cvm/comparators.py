"""Losses of the methods that the paper compares with (section 5.3): each works on the pixels that nobody labelled.

Every one of them is added to the partial cross-entropy on the points. Here stand the formulas alone; views, teacher
passes, weights and ramps belong to the training step. Logits are (B,C,h,w) with C >= 2 classes and a softmax over C.
What the cited papers leave open is marked (reconstructed).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.methods.cvm.contrast import correlation_maps

# Tang et al., ECCV 2018, README of the authors' code (PASCAL, images of about 500 px)
SIGMA_RGB = 15 / 255
SIGMA_XY = 100.0  # px
CELLS = 48  # ours: the kernel has (48 x 48)^2 values per image

# Yu et al., MICCAI 2019, and their code; Liu et al. 2022 take the scheme over
TEACHER_DECAY = 0.99
TEACHER_PASSES = 8
TEACHER_NOISE = 0.1  # standard deviation on the network's input, cut off at +-0.2 in the code
CONSISTENCY_WEIGHT = 0.1  # times ramp_up
RAMP_STEEPNESS = 5.0
FIRST_THRESHOLD = 0.75  # of ln C

# Luo et al., MICCAI 2022, and their code
PSEUDO_LABEL_WEIGHT = 0.5
AUXILIARY_DROPOUT = 0.5  # in front of the second decoder
DICE_SMOOTHING = 1e-5

# Berthelot et al., NeurIPS 2019
SHARPENING_TEMPERATURE = 0.5
VIEWS = 2
MIXUP_BETA = 0.75  # lambda ~ Beta(.75, .75)

SIMILARITY_TEMPERATURE = 0.1  # (reconstructed)


def crf_loss(
    probabilities: Tensor,
    images: Tensor,
    *,
    sigma_rgb: float = SIGMA_RGB,
    sigma_xy: float = SIGMA_XY,
    cells: int = CELLS,
) -> Tensor:
    r"""Relaxed energy of a dense conditional random field: pixels that are near and alike should agree.

    .. math::
        E = \frac{\sum_k S_k^\top W (1 - S_k)}{\mathbf 1^\top W \mathbf 1}, \qquad
        W_{ij} = \exp\left(-\frac{|x_i-x_j|^2}{2\sigma_{xy}^2} - \frac{|c_i-c_j|^2}{2\sigma_{rgb}^2}\right),
        \quad W_{ii} = 0

    with the probabilities S_k of class k, the places x and the colours c. As the probabilities of a pixel sum to 1, E
    is the mean over the pairs, weighted by W, of :math:`1 - \sum_k S_{ik} S_{jk}`.

    Deviations from the source. (1) The source sums; here the sum is divided by the total weight of the kernel, one
    number per image: the minimiser stays, and the weight of the loss no longer depends on size and texture. On
    scikit-image's immunohistochemistry image (512 px, halved) the 1.5e-9 of the authors' code becomes about .14.
    (2) The source filters on a permutohedral lattice; here the kernel is exact, on probabilities and colours averaged
    over at most ``cells`` x ``cells`` cells, with distances in pixels of the input. (3) The authors' code keeps
    :math:`W_{ii}` and leaves out the constant :math:`\sum_k S_k^\top W \mathbf 1`.

    Memory: B (cells^2)^2 values for the kernel, kept for the gradient (21 MB per image in float32 with 48 cells).

    Args:
        probabilities: (B,C,h,w) in [0,1], sum 1 over C.
        images: (B,3,h,w) in [0,1]; no gradient flows into them.
        sigma_rgb: width of the kernel in colour, in units of the images.
        sigma_xy: width of the kernel in place, px of the input.
        cells: most cells along the longer side; a smaller input stays as it is.

    Returns:
        Scalar in [0,1], mean over the images: 0 where every pair that matters agrees with certainty.

    Source: Tang et al., ECCV 2018, "On regularized losses for weakly-supervised CNN segmentation" (dense CRF loss).

    Raises:
        InputError: images and probabilities that differ in size; a width or a number of cells that is not positive.
    """
    if images.shape != (len(probabilities), 3, *probabilities.shape[2:]):
        rule = f"have shape {tuple(images.shape)}, the probabilities {tuple(probabilities.shape)}"
        raise InputError("images", rule, "give (B,3,h,w) at the size of the probabilities")
    for name, value in (("sigma_rgb", sigma_rgb), ("sigma_xy", sigma_xy), ("cells", cells)):
        if not value > 0:
            raise InputError(f"{name} {value}", "is not positive", "the authors use 15/255 and 100 px")
    # half precision would spoil the exponent of the kernel
    with torch.autocast(probabilities.device.type, enabled=False):
        shape = _reduced_shape(probabilities, cells)
        small = F.adaptive_avg_pool2d(_full_precision(probabilities), shape).flatten(2)
        with torch.no_grad():
            kernel = _bilateral_kernel(images.to(small.dtype), shape, sigma_rgb, sigma_xy)
            degrees = kernel.sum(2)
            total = degrees.sum(1).clamp_min(torch.finfo(small.dtype).tiny)
        agreement = small @ kernel
        energy = (small * (degrees[:, None] - agreement)).sum((1, 2))
        return (energy / total).mean()


def uncertain_consistency_loss(student_logits: Tensor, teacher_logits: Tensor, threshold: float) -> Tensor:
    r"""Squared distance to the mean teacher, over the pixels where the teacher is sure.

    .. math::
        L = \frac{\sum_i [u_i < H] \frac1C \sum_k (s_{ik} - \mu_{ik})^2}{\sum_i [u_i < H]}, \qquad
        \mu = \frac1T \sum_t \mathrm{softmax}(z_t), \qquad u_i = -\sum_k \mu_{ik} \ln \mu_{ik}

    The target is the mean over the noisy passes; the authors' code measures u by it and takes one more pass as target.

    Args:
        student_logits: (B,C,h,w).
        teacher_logits: (T,B,C,h,w), one row per pass with its own noise; no gradient flows into them.
        threshold: H in nats, see :func:`entropy_threshold`.

    Returns:
        Scalar; 0 with zero gradient where no pixel is sure.

    Source: Yu et al., MICCAI 2019, "Uncertainty-aware self-ensembling model"; Liu et al., Pattern Recognition 122
    (2022) 108341, use it with scribbles and show the teacher the image turned by a multiple of 90 degrees.
    """
    mean = _probabilities(teacher_logits.detach(), 2).mean(0)
    sure: Tensor = torch.special.entr(mean).sum(1) < threshold
    distance = (_probabilities(student_logits) - mean).square().mean(1)
    return (distance * sure).sum() / sure.sum().clamp_min(1)


def ramp_up(progress: float) -> float:
    r"""Weight that grows along a Gaussian, :math:`e^{-5(1-t)^2}`, from .0067 to 1.

    Args:
        progress: t, part of the training that is done; values outside [0,1] count as 0 or 1.

    Source: Laine and Aila, ICLR 2017; used by Yu et al., MICCAI 2019.
    """
    return math.exp(-RAMP_STEEPNESS * (1 - min(max(progress, 0.0), 1.0)) ** 2)


def entropy_threshold(progress: float, num_classes: int = 2) -> float:
    r"""Entropy below which a pixel of the teacher counts, :math:`(\frac34 + \frac14 e^{-5(1-t)^2}) \ln C` in nats.

    Args:
        progress: t, part of the training that is done.
        num_classes: C; the source has 2.

    Source: Yu et al., MICCAI 2019: from 3/4 of the largest entropy to all of it.
    """
    return (FIRST_THRESHOLD + (1 - FIRST_THRESHOLD) * ramp_up(progress)) * math.log(num_classes)


def teacher_decay(step: int) -> float:
    r"""Part of the teacher that stays in update number ``step`` (from 0): :math:`\min(1 - \frac{1}{step+1}, .99)`.

    The first updates are then plain means of the students so far, and number 0 copies the student.

    Source: Tarvainen and Valpola, NeurIPS 2017 (authors' code); .99 from Yu et al., MICCAI 2019.
    """
    return min(1 - 1 / (step + 1), TEACHER_DECAY)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    r"""Move the teacher towards the student, in place: :math:`\theta' \leftarrow d\,\theta' + (1-d)\,\theta`.

    Parameters and floating-point buffers (running means of normalisation) are averaged, other buffers (counters)
    copied. The sources average parameters alone and let the teacher's own passes set its running means
    (reconstructed): so the teacher may run in evaluation mode.

    Args:
        teacher: network of the same structure; changed.
        student: network; not changed.
        decay: d in [0,1], see :func:`teacher_decay`.

    Raises:
        InputError: decay outside [0,1], or networks of different structure.
    """
    if not 0 <= decay <= 1:
        raise InputError(f"decay {decay}", "is not in 0..1", "the paper uses 0.99")
    old, new = teacher.state_dict(), student.state_dict()
    if {name: value.shape for name, value in old.items()} != {name: value.shape for name, value in new.items()}:
        raise InputError("teacher", "has other parameters than the student", "make it a deep copy of the student")
    for name, value in old.items():
        if value.is_floating_point():
            value.lerp_(new[name].to(value), 1 - decay)
        else:
            value.copy_(new[name])


def mixed_pseudo_label_loss(main_logits: Tensor, auxiliary_logits: Tensor, alpha: float) -> Tensor:
    r"""Two decoders learn from the hard labels of a random mixture of themselves.

    .. math::
        PL = \arg\max_k (\alpha y_1 + (1-\alpha) y_2), \qquad
        L = \tfrac12 \left( L_{Dice}(y_1, PL) + L_{Dice}(y_2, PL) \right)

    Args:
        main_logits: (B,C,h,w); y_1 is their softmax.
        auxiliary_logits: (B,C,h,w) of the second decoder, which sees its features through dropout.
        alpha: in [0,1], drawn anew for every step.

    Returns:
        Scalar in [0,1]; the labels carry no gradient.

    Source: Luo et al., MICCAI 2022 (arXiv 2203.02106); added with weight .5 to the mean of both partial
    cross-entropies. Dice as in :func:`soft_dice_loss`.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha}", "is not in 0..1", "draw it uniformly for every step")
    main, auxiliary = _probabilities(main_logits), _probabilities(auxiliary_logits)
    labels = (alpha * main + (1 - alpha) * auxiliary).detach().argmax(1)
    return 0.5 * (soft_dice_loss(main, labels) + soft_dice_loss(auxiliary, labels))


def soft_dice_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    r"""One minus the soft Dice coefficient with squares below, mean over the classes.

    .. math::
        L = 1 - \frac1C \sum_k \frac{2 \sum_i y_{ik} t_{ik} + \epsilon}{\sum_i y_{ik}^2 + \sum_i t_{ik}^2 + \epsilon}

    The sums run over all pixels of the batch. A class in no label counts too: its probability is pulled to 0.

    Args:
        probabilities: (B,C,h,w) y in [0,1].
        labels: (B,h,w) int64 in 0..C-1; t are their one-hot maps.

    Returns:
        Scalar in [0,1].

    Source: Milletari et al., 3DV 2016; sums over the batch and :math:`\epsilon` = 1e-5 as in the code of Luo et al.
    """
    truth = F.one_hot(labels, probabilities.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    overlap = (probabilities * truth).sum((0, 2, 3))
    sizes = (probabilities.square() + truth).sum((0, 2, 3))  # 0 and 1 are their own squares
    return 1 - ((2 * overlap + DICE_SMOOTHING) / (sizes + DICE_SMOOTHING)).mean()


def sharpen(probabilities: Tensor, temperature: float = SHARPENING_TEMPERATURE) -> Tensor:
    r"""Lower the entropy of a distribution over dimension 1: :math:`p_k^{1/T} / \sum_l p_l^{1/T}`.

    Meant for targets: the gradient is undefined where a probability is 0.

    Args:
        probabilities: (B,C,...) in [0,1], sum 1 over C.
        temperature: T > 0; 1 changes nothing, towards 0 the largest takes all.

    Returns:
        (B,C,...), sum 1 over C.

    Source: Berthelot et al., NeurIPS 2019 (MixMatch), Eq. 7.

    Example:
        >>> sharpen(torch.tensor([[0.25, 0.75]])).mul(100).round().tolist()
        [[10.0, 90.0]]
    """
    _check_temperature(temperature)
    # in logarithms small temperatures cannot make every power 0
    return (probabilities.log() / temperature).softmax(1)


def guess_labels(view_logits: Tensor, temperature: float = SHARPENING_TEMPERATURE) -> Tensor:
    r"""Target for all views of an image: :math:`\mathrm{Sharpen}(\frac1K \sum_k \mathrm{softmax}(z_k), T)`.

    Args:
        view_logits: (K,B,C,h,w), each view mapped back to the frame of the image (flips undone).
        temperature: T of :func:`sharpen`.

    Returns:
        (B,C,h,w), sum 1 over C, without gradient.

    Source: Berthelot et al., NeurIPS 2019, Eq. 6 and 7, K = 2. Gao et al., MICCAI 2020, use MixMatch on patches with
    one label each; per pixel, with the geometry undone, is (reconstructed).
    """
    return sharpen(_probabilities(view_logits.detach(), 2).mean(0), temperature)


def mixup(images: Tensor, targets: Tensor, lam: float | Tensor, permutation: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mix each image, and its targets, with another of the batch, staying nearer to itself.

    .. math::
        \lambda' = \max(\lambda, 1-\lambda), \qquad x' = \lambda' x + (1-\lambda') x_\pi, \qquad
        t' = \lambda' t + (1-\lambda') t_\pi

    Args:
        images: (B,3,H,W).
        targets: (B,C,h,w) probabilities, of :func:`guess_labels`.
        lam: in [0,1], from Beta(.75, .75): one number, or (B,) one per image.
        permutation: (B,) int64, the partner of each image.

    Source: Berthelot et al., NeurIPS 2019, Eq. 8 to 11. The partial cross-entropy stays on the images that are not
    mixed, as two images seldom have points at the same place (reconstructed).
    """
    share = torch.as_tensor(lam, dtype=targets.dtype, device=targets.device)
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise InputError("lam", "has a value outside 0..1", "draw it from Beta(0.75, 0.75)")
    share = torch.maximum(share, 1 - share).view(-1, 1, 1, 1)
    return _blend(images, share.to(images.dtype), permutation), _blend(targets, share, permutation)


def consistency_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Mean squared distance of the probabilities to given ones, :math:`\frac{1}{CBhw}\sum (softmax(z) - t)^2`.

    With logits of mixed images and mixed guesses (:func:`guess_labels`, :func:`mixup`) it is the unlabelled loss of
    MixMatch; with :func:`similarity_targets`, a batch of them, the loss of Peng et al. (reconstructed).

    Args:
        logits: (B,C,h,w).
        targets: (B,C,h,w) probabilities; no gradient flows into them.

    Returns:
        Scalar in [0,2/C].

    Source: Berthelot et al., NeurIPS 2019, Eq. 4.
    """
    return (_probabilities(logits) - targets.detach()).square().mean()


def similarity_targets(
    features: Tensor,
    points: Tensor,
    classes: Tensor,
    num_classes: int,
    temperature: float = SIMILARITY_TEMPERATURE,
) -> Tensor:
    r"""Soft labels of all pixels from the cosine similarity of their features to those of the labelled points.

    .. math::
        s_k(i) = \max_{p: c_p = k} \cos(f_p, f_i), \qquad t_k(i) = \frac{e^{s_k(i)/T}}{\sum_l e^{s_l(i)/T}}

    over the classes that have points. With points of one class its map is 1 everywhere and says nothing: leave such
    an image out.

    (reconstructed): of the source only the abstract was at hand (a network that learns from annotated and other
    areas, and a Fisher loss, which is not rebuilt), and from the CVM paper that it "utilizes cosine similarity maps".
    The maximum over the points of a class, the softmax and its temperature are ours.

    Args:
        features: (D,h,w) feature map of one image; no gradient flows into it.
        points: (n,2) int rows of (row, column) at feature resolution, n >= 1.
        classes: (n,) int64 class of each point, in 0..num_classes-1.
        num_classes: C.
        temperature: T > 0.

    Returns:
        (C,h,w), sum 1 over C, 0 for a class without points, no gradient.

    Source: Peng et al., IEEE JBHI 24(8), 2020, "Semi-supervised learning for semantic segmentation of emphysema with
    partial annotations"; similarities: Zhang et al., CVPR 2023, Eq. 4.

    Raises:
        InputError: no point, a point outside the map, a class outside the range, temperature not above 0.
    """
    _check_temperature(temperature)
    if not len(points):
        raise InputError("points", "are missing", "give at least one point, or leave the image out")
    if classes.shape != points.shape[:1] or classes.is_floating_point():
        rule = f"have shape {tuple(classes.shape)} and type {classes.dtype} for {len(points)} points"
        raise InputError("classes", rule, "give one integer per point")
    wrong = (classes < 0) | (classes >= num_classes)
    if bool(wrong.any()):
        raise InputError(f"class {int(classes[wrong][0])}", f"is not in 0..{num_classes - 1}", "count classes from 0")
    maps = correlation_maps(features.detach(), points)
    nearest = maps.new_full((num_classes, *maps.shape[1:]), -torch.inf)
    rows = classes.to(maps.device, torch.int64)[:, None, None].expand_as(maps)
    nearest.scatter_reduce_(0, rows, maps, "amax")
    return (nearest / temperature).softmax(0)


def _bilateral_kernel(images: Tensor, shape: tuple[int, int], sigma_rgb: float, sigma_xy: float) -> Tensor:
    """(B,n,n) Gaussian of place and colour between the n cells, 0 on the diagonal."""
    height, width = images.shape[2:]
    colours = F.adaptive_avg_pool2d(images, shape).flatten(2) / sigma_rgb
    centres = [
        (torch.arange(count, dtype=images.dtype, device=images.device) + 0.5) * (size / count / sigma_xy)
        for size, count in ((height, shape[0]), (width, shape[1]))
    ]
    places = torch.stack(torch.meshgrid(*centres, indexing="ij")).flatten(1)
    vectors = torch.cat([colours, places.expand(len(images), -1, -1)], 1)
    vectors = vectors - vectors.mean(2, keepdim=True)  # smaller numbers cancel less below
    halves = 0.5 * vectors.square().sum(1)
    # -|a-b|^2/2 = ab - a^2/2 - b^2/2, in place: one kernel in memory, not one per step
    exponent = vectors.mT @ vectors
    kernel = exponent.sub_(halves[:, :, None]).sub_(halves[:, None]).exp_()
    kernel.diagonal(dim1=1, dim2=2).zero_()
    return kernel


def _reduced_shape(maps: Tensor, cells: int) -> tuple[int, int]:
    """Height and width with at most ``cells`` on the longer side, in the proportion of the maps."""
    height, width = maps.shape[2:]
    scale = max(1.0, max(height, width) / cells)
    return max(1, round(height / scale)), max(1, round(width / scale))


def _blend(values: Tensor, share: Tensor, permutation: Tensor) -> Tensor:
    return share * values + (1 - share) * values[permutation]


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature {temperature}", "is not positive", "take a number above 0")


def _probabilities(logits: Tensor, dim: int = 1) -> Tensor:
    return _full_precision(logits).softmax(dim)


def _full_precision(values: Tensor) -> Tensor:
    """At least float32: sums over an image do not survive half precision."""
    return values if values.dtype == torch.float64 else values.float()
