"""Entropic optimal transport between two paths of hidden states, in a band, without padding.

How far has the policy moved its last hidden states from the anchor's, if a token may be matched with a
neighbour up to `window` places away? The cost is 1 - cos, the marginals are uniform over a completion, and
a matrix is kept as its band: `[tokens, 2w+1]`, column k of row i being the pair (i, i + k - w), w = window.
Completions lie end to end; pairs across two of them get no mass.

Everything is solved in the logarithm and in units of eps: `kernel` is -C / eps, `f` and `g` are potentials / eps.
Left out: unbalanced transport, annealing of eps, and a stopping rule (a fixed number of iterations needs no
device sync, and makes the value of a completion independent of what it is packed with).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sinkhorn_divergence(
    policy_hidden: Tensor,  # [tokens, hidden]
    anchor_hidden: Tensor,  # [tokens, hidden], never receives a gradient
    episode_index: Tensor,  # [tokens], non-decreasing: the completion a token belongs to
    episodes: int,
    *,
    window: int,
    eps: float,
    iterations: int,
    debias: bool = True,
    taper: bool = False,
    unroll: bool = False,
    backend: str = "band",
) -> Tensor:
    """`[episodes]`: OT = min over plans P of <P, C> + eps KL(P || a x b); 0 for an episode without tokens.

    `debias` subtracts half of OT(policy, policy) and of OT(anchor, anchor): zero at equality (Feydy et al. 2019,
    arXiv:1810.08278, eq. 3). The gradient is the plan, held constant (envelope theorem); `unroll` differentiates
    the iterations instead, and keeps every one of them in memory. `backend="pot"` is a dense check.

    A band with a hard edge is no positive definite kernel, so the debiased value can be negative and its descent
    can lead AWAY from the anchor. `taper` adds -eps log(1 - |i - j| / (w + 1)) to the cost: that triangle is positive
    definite, so is its product with exp(cos / eps), and the converged value is >= 0 (Feydy et al. 2019, theorem 1).
    """
    policy, anchor = _unit_rows(policy_hidden), _unit_rows(anchor_hidden.detach())
    pairs = [(policy, anchor), (policy, policy), (anchor, anchor)] if debias else [(policy, anchor)]
    if len(policy) == 0:
        return policy.sum().expand(episodes)  # zeros, with a graph
    if backend == "pot":
        lengths = torch.bincount(episode_index, minlength=episodes).tolist()
        problems = [paths for pair in pairs for paths in zip(*(path.split(lengths) for path in pair), strict=True)]
        costs = [_pot_value(left, right, window, eps, iterations, taper, unroll) for left, right in problems]
        values = torch.stack(costs).view(len(pairs), episodes)
    elif backend == "band":
        # The three problems lie end to end too, so the iterations run once for all of them.
        kernel = torch.cat([_log_kernel(*pair, episode_index, window, eps, taper) for pair in pairs])
        log_mass = _log_mass(episode_index, episodes, kernel.dtype).repeat(len(pairs))  # [problems * tokens]
        per_token = eps * _dual_terms(kernel, log_mass, iterations, unroll).view(len(pairs), -1)  # [problems, tokens]
        values = per_token.new_zeros(len(pairs), episodes).index_add(1, episode_index, per_token)
    else:
        raise ValueError(f"unknown Sinkhorn backend {backend!r}: use 'band' or 'pot'")
    return values[0] - (values[1] + values[2]) / 2 if debias else values[0]


@torch.no_grad()
def transport_plan(
    policy_hidden: Tensor, anchor_hidden: Tensor, *, window: int, eps: float, iterations: int, taper: bool = False
) -> Tensor:
    """The plan of one completion, dense `[tokens, tokens]`, for a figure."""
    tokens = len(policy_hidden)
    index = torch.zeros(tokens, dtype=torch.long, device=policy_hidden.device)
    kernel = _log_kernel(_unit_rows(policy_hidden), _unit_rows(anchor_hidden), index, window, eps, taper)
    log_mass = _log_mass(index, 1, kernel.dtype)
    plan = _plan(kernel, log_mass, *_potentials(kernel, log_mass, iterations))  # [tokens, 2w+1]
    width = plan.shape[1]
    columns = torch.arange(tokens, device=plan.device)[:, None] + torch.arange(width, device=plan.device)
    dense = plan.new_zeros(tokens, tokens + width - 1).scatter(1, columns, plan)
    return dense[:, width // 2 : width // 2 + tokens]


def _dual_terms(kernel: Tensor, log_mass: Tensor, iterations: int, unroll: bool) -> Tensor:
    """`[tokens]`, each token's share of the dual objective <a, f> + <b, g> - eps (sum P - 1), over eps.

    At convergence the dual is <P, C> + eps KL(P || a x b); before, it is a lower bound. Its derivative in C is P
    whatever the potentials, and in the potentials it vanishes at convergence. So detached potentials give the
    implicit gradient, potentials with their graph the unrolled one, and the formula is the same.
    """
    with torch.set_grad_enabled(unroll and torch.is_grad_enabled()):
        f, g = _potentials(kernel, log_mass, iterations)  # [tokens] each
    return log_mass.exp() * (f + g + 1) - _plan(kernel, log_mass, f, g).sum(-1)


def _potentials(kernel: Tensor, log_mass: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Averaged Sinkhorn updates (Feydy et al. 2019, section 3): f <- (f + softmin g) / 2, and g at the same time.

    Alternating updates favour the side that came last. These treat both alike, so equal inputs give f = g and
    a symmetric plan after any number of iterations, and the debiased gradient is zero there, converged or not.
    They also keep f_i + g_j - C_ij <= eps log T, so a plan can't overflow.
    """
    transposed = _transpose_band(kernel)
    f = g = torch.zeros_like(log_mass)
    for _ in range(iterations):
        softmin_g = -(kernel + _neighbours(g + log_mass, kernel)).logsumexp(-1)  # [tokens]
        softmin_f = -(transposed + _neighbours(f + log_mass, kernel)).logsumexp(-1)
        f, g = (f + softmin_g) / 2, (g + softmin_f) / 2
    return f, g


def _plan(kernel: Tensor, log_mass: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """P = a b exp((f + g - C) / eps), `[tokens, 2w+1]`."""
    return (kernel + (f + log_mass)[:, None] + _neighbours(g + log_mass, kernel)).exp()


def _neighbours(values: Tensor, band: Tensor) -> Tensor:
    """values[i + k - w] at (i, k): a view `[tokens, 2w+1]` of one padded vector."""
    width = band.shape[1]
    return F.pad(values, (width // 2, width // 2)).unfold(0, width, 1)


def _transpose_band(band: Tensor) -> Tensor:
    """band[j + k - w, 2w - k] at (j, k): the band of the transposed matrix."""
    tokens, width = band.shape
    padded = F.pad(band, (0, 0, width // 2, width // 2), value=-torch.inf)  # row j + k now holds token j + k - w
    # (j + k) * width + (2w - k) = j * width + k * 2w + 2w, with 2w = width - 1
    return padded.as_strided((tokens, width), (width, width - 1), width - 1).contiguous()


def _unit_rows(hidden: Tensor) -> Tensor:
    """Rows of length 1 in fp32 (fp64 stays fp64). A zero row stays zero: cost 1 to all, and no NaN behind it."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)  # [tokens, 1]
    return hidden / torch.where(norm > 0, norm, 1)


def _log_mass(index: Tensor, episodes: int, dtype: torch.dtype) -> Tensor:
    """`[tokens]`: the log of each token's share of its episode, -log T."""
    lengths = torch.zeros(episodes, dtype=torch.long, device=index.device).index_add(0, index, torch.ones_like(index))
    return -lengths[index].to(dtype).log()


def _log_kernel(left: Tensor, right: Tensor, index: Tensor, window: int, eps: float, taper: bool) -> Tensor:
    """(<left_i, right_{i+k-w}> - 1) / eps at (i, k), and -inf for a pair that isn't within one episode.

    A block of 2w rows needs 4w columns: one small matmul a block, twice the arithmetic of the band. Both its
    factors are views, so autograd keeps the padded rows and nothing of size tokens * window * hidden.
    """
    tokens, hidden = left.shape
    slope, window = window + 1, min(window, tokens - 1)  # the taper doesn't depend on the batch
    offsets = torch.arange(2 * window + 1, device=left.device)  # k
    block = max(2 * window, 16)
    tail = -tokens % block
    rows = F.pad(left, (0, 0, 0, tail)).view(-1, block, hidden)
    columns = F.pad(right, (0, 0, window, window + tail)).unfold(0, block + 2 * window, block)
    with torch.autocast(left.device.type, enabled=False):
        dots = rows @ columns  # [blocks, block, block + 2w]
    skew = torch.arange(block, device=left.device)[:, None] + offsets  # row b of a block starts at its column b
    band = dots.gather(2, skew.expand(len(rows), -1, -1)).view(-1, 2 * window + 1)[:tokens]
    kernel = (band - 1) / eps
    if taper:
        kernel = kernel + torch.log1p(-(offsets - window).abs() / slope)
    neighbour = F.pad(index, (window, window), value=-1).unfold(0, 2 * window + 1, 1)  # [tokens, 2w+1]
    return kernel.masked_fill(neighbour != index[:, None], -torch.inf)


def _pot_value(
    left: Tensor, right: Tensor, window: int, eps: float, iterations: int, taper: bool, unroll: bool
) -> Tensor:
    """The same value from POT, for one episode and with a dense cost: what the band is checked against."""
    import ot

    tokens = len(left)
    if tokens == 0:
        return left.sum()
    position, share = torch.arange(tokens, device=left.device), left.new_full((tokens,), 1 / tokens)
    distance = (position[:, None] - position).abs()  # [tokens, tokens]
    cost = 1 - left @ right.T
    if taper:
        cost = cost - eps * torch.log((1 - distance / (window + 1)).clamp(min=1e-30))
    far = cost.masked_fill(distance > window, 1e6)
    with torch.set_grad_enabled(unroll and torch.is_grad_enabled()):
        plan = ot.sinkhorn(share, share, far, eps, "sinkhorn_log", numItermax=iterations, stopThr=0, warn=False)
    mass = plan[plan > 0]  # the logarithm of the zeros outside the band has no gradient
    return (plan * cost).sum() + eps * (mass * (mass * tokens**2).log()).sum()
