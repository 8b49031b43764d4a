"""The definitions of the library's ops as loops over tokens in NumPy float64.

Nothing here is clever: what an op means must be readable at a glance, and share no code with it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Inputs = Mapping[str, np.ndarray]


def softmax_attention(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    return_lse: bool = False,
) -> np.ndarray:
    """Softmax-weighted means of the visible values; with `return_lse`, its log-sum-exp appended."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    slopes = inputs.get("alibi_slopes", np.zeros(q.shape[2]))
    out = np.zeros((*q.shape[:3], v.shape[-1] + return_lse))
    for b, t, n, head, seen in _queries(q, k, segment_ids, causal):
        if window is not None:
            seen = seen[(seen > t - window) | (seen < seen[0] + sinks)]
        x = k[b, seen, head] @ q[b, t, n] / np.sqrt(q.shape[-1]) - slopes[n] * np.abs(t - seen)
        weights = np.exp(x - x.max())
        out[b, t, n, : v.shape[-1]] = weights @ v[b, seen, head] / weights.sum()
        if return_lse:
            out[b, t, n, -1] = x.max() + np.log(weights.sum())
    return out


def agent_attention(
    inputs: Inputs, segment_ids: np.ndarray | None, *, causal: bool = True
) -> np.ndarray:
    """Agents read the visible keys, the query reads the agents."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    root = np.sqrt(q.shape[-1])
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n, head, seen in _queries(q, k, segment_ids, causal):
        agents = inputs["agents"][:, n]
        key_bias = inputs.get("key_bias", np.zeros((n + 1, len(agents), k.shape[1])))[n]
        query_bias = inputs.get("query_bias", np.zeros((n + 1, q.shape[1], len(agents))))[n, t]
        read = [
            _softmax(k[b, seen, head] @ agent / root + bias[seen]) @ v[b, seen, head]
            for agent, bias in zip(agents, key_bias, strict=True)
        ]
        out[b, t, n] = _softmax(agents @ q[b, t, n] / root + query_bias) @ np.array(read)
    return out


def core_context_attention(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    group_size: int,
    window: int,
    share_cores: bool = False,
) -> np.ndarray:
    """The far past by groups, pooled by the query of their last token; the rest token by token."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    shared = q.shape[2] // k.shape[2]

    @functools.cache  # Every later query sees the same group.
    def pooled(b: int, n: int, head: int, group: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        heads = range(head * shared, (head + 1) * shared) if share_cores else [n]
        scorer = np.mean([q[b, group[-1], h] for h in heads], axis=0)
        weights = _softmax(k[b, group, head] @ scorer / np.sqrt(q.shape[-1]))
        return weights @ k[b, group, head], weights @ v[b, group, head]

    for b, t, n, head, seen in _queries(q, k, segment_ids, causal):
        far = max(0, (seen.size - window) // group_size)
        groups = seen[: far * group_size].reshape(far, group_size).tolist()
        cores = [pooled(b, n, head, tuple(group)) for group in groups]
        near = seen[far * group_size :]
        keys = np.array([*(core for core, _ in cores), *k[b, near, head]])
        values = np.array([*(core for _, core in cores), *v[b, near, head]])
        out[b, t, n] = _softmax(keys @ q[b, t, n] / np.sqrt(q.shape[-1])) @ values
    return out


def routing_attention(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    cluster_size: int,
    strict: bool,
) -> np.ndarray:
    """Softmax among the last tokens of one's cluster, or averaged over balanced clusters."""
    q, v = inputs["q"], inputs["v"]
    x = q - q.mean(axis=-1, keepdims=True)
    x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    out, times = np.zeros((*q.shape[:3], v.shape[-1])), np.zeros((*q.shape[:3], 1))
    for b, t, n, head, seen in _queries(q, v, segment_ids, causal):
        document = _visible(b, t, q.shape[1], segment_ids, causal=False)
        affinity = x[b, :, n] @ inputs["centroids"][n].T
        for c, column in enumerate(affinity.T):
            if strict:
                keys = seen[affinity[seen].argmax(axis=-1) == c][-cluster_size:]
            else:
                nearest = document[np.argsort(-column[document], kind="stable")]
                keys = np.intersect1d(nearest[:cluster_size], document)
            if t in keys:
                keys = np.intersect1d(keys, seen)
                weights = _softmax(x[b, keys, n] @ x[b, t, n] / np.sqrt(q.shape[-1]))
                out[b, t, n] += weights @ v[b, keys, head]
                times[b, t, n] += 1
    return out / np.maximum(times, 1)


def selective_attention(
    inputs: Inputs, segment_ids: np.ndarray | None, *, causal: bool = True
) -> np.ndarray:
    """Scores times the query's temperature, values times their own."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    out = np.zeros(q.shape)
    for b, t, n, head, seen in _queries(q, k, segment_ids, causal):
        x = inputs["query_temperature"][b, t, n] * (k[b, seen, head] @ q[b, t, n])
        weights = np.exp((x - x.max()) / np.sqrt(q.shape[-1]))
        values = inputs["value_temperature"][b, seen, head][:, None] * v[b, seen, head]
        out[b, t, n] = weights @ values / weights.sum()
    return out


def taylor(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """1 + x + x²/2 with x = q·k / sqrt(F), the weight of each key `[s,F]` for a query `[F]`."""
    x = k @ q / np.sqrt(q.shape[-1])
    return 1 + x + x**2 / 2


def feature_weight(phi: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """phi(q)·phi(k) / sqrt(F), with F the size before the map."""
    return lambda q, k: phi(k) @ phi(q) / np.sqrt(q.shape[-1])


def elu_plus_one(x: np.ndarray) -> np.ndarray:
    """x + 1 above zero, exp(x) below."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def linear_attention(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    weight: Callable[[np.ndarray, np.ndarray], np.ndarray] = taylor,
    normalize: bool = True,
) -> np.ndarray:
    """Weighted sums of the visible values, divided by the sum of weights if `normalize`."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n, head, seen in _queries(q, k, segment_ids, causal):
        weights = weight(q[b, t, n], k[b, seen, head])
        out[b, t, n] = weights @ v[b, seen, head] / (weights.sum() if normalize else 1)
    return out


def gated_linear_attention(
    inputs: Inputs, segment_ids: np.ndarray | None, *, causal: bool = True
) -> np.ndarray:
    """S = e^g S + k vᵀ, o = Sᵀ q / sqrt(F)."""
    assert causal
    return _recurrence(inputs, segment_ids, lambda S, k, v, beta: np.outer(k, v))


def gated_delta_rule(
    inputs: Inputs, segment_ids: np.ndarray | None, *, causal: bool = True
) -> np.ndarray:
    """S = e^g S, then S = S + beta k (v - Sᵀ k)ᵀ, o = Sᵀ q / sqrt(F)."""
    assert causal
    return _recurrence(inputs, segment_ids, lambda S, k, v, beta: beta * np.outer(k, v - S.T @ k))


def _recurrence(inputs: Inputs, segment_ids: np.ndarray | None, write: Callable) -> np.ndarray:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (B, T, N, F), K, H = q.shape, k.shape[2], v.shape[3]
    log_decay, beta = (inputs.get(name, np.zeros((B, T, N))) for name in ("log_decay", "beta"))
    out = np.zeros((B, T, N, H))
    for b, n in np.ndindex(B, N):
        S, document = np.zeros((F, H)), None
        head, gate = n * K // N, n * log_decay.shape[2] // N
        for t in range(T):
            if segment_ids is not None:
                if segment_ids[b, t] < 0:
                    continue
                if segment_ids[b, t] != document:
                    S, document = np.zeros((F, H)), segment_ids[b, t]
            S = np.exp(log_decay[b, t, gate]).reshape(-1, 1) * S
            S = S + write(S, k[b, t, head], v[b, t, head], beta[b, t, n * beta.shape[2] // N])
            out[b, t, n] = S.T @ q[b, t, n] / np.sqrt(F)
    return out


def gelu(x: np.ndarray) -> np.ndarray:
    """In its tanh form."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def neural_memory(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    chunk_size: int,
    activation: Callable[[np.ndarray], np.ndarray] = gelu,
) -> np.ndarray:
    """S = eta S - theta grad |M(k) - v|², M = (1 - alpha) M + S, o = M(q); layers `w0`, `w1`."""
    assert causal
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    starts = [inputs[name] for name in sorted(inputs) if name.startswith("w")]
    (B, T, N), K, states = q.shape[:3], k.shape[2], inputs["decay"].shape[2]
    out = np.zeros((B, T, N, v.shape[3]))
    for b, n in np.ndindex(B, N):
        head, state = n * K // N, n * states // N
        document, count, anchor, weights, momenta = None, 0, [], [], []
        for t in range(T):
            ids = 0 if segment_ids is None else segment_ids[b, t]
            if ids < 0:
                continue
            if ids != document:
                document, count = ids, 0
                weights = [start[state] for start in starts]
                momenta = [np.zeros_like(w) for w in weights]
            if count % chunk_size == 0:
                anchor = weights
            count += 1
            slopes = _memory_gradients(anchor, k[b, t, head], v[b, t, head], activation)
            theta, eta, alpha = (
                inputs[gate][b, t, state] for gate in ("learning_rate", "momentum", "decay")
            )
            momenta = [eta * s - theta * slope for s, slope in zip(momenta, slopes, strict=True)]
            weights = [(1 - alpha) * w + s for w, s in zip(weights, momenta, strict=True)]
            *inner, last = weights
            x = q[b, t, n]
            for w in inner:
                x = activation(x @ w)
            out[b, t, n] = x @ last
    return out


def _memory_gradients(weights, k, v, activation) -> list[np.ndarray]:
    """Of |M(k) - v|² by the chain rule; slopes of the activation by a step along the imaginary."""
    inputs, sums = [k], []
    for w in weights:
        sums.append(inputs[-1] @ w)
        inputs.append(activation(sums[-1]))
    error, gradients = 2 * (sums[-1] - v), []
    for layer in reversed(range(len(weights))):
        gradients.insert(0, np.outer(inputs[layer], error))
        if layer:
            slope = activation(sums[layer - 1] + 1e-30j).imag / 1e-30
            error = slope * (weights[layer] @ error)
    return gradients


def short_convolution(
    inputs: Inputs, segment_ids: np.ndarray | None, *, causal: bool = True
) -> np.ndarray:
    """Products with the taps, the last of which weighs the token itself."""
    assert causal
    x, weight = inputs["x"], inputs["weight"]
    y = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        for s in _visible(b, t, x.shape[1], segment_ids, causal=True):
            if t - s < weight.shape[1]:
                y[b, t] += weight[:, weight.shape[1] - 1 - (t - s)] * x[b, s]
    return y


def ngram_attention(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    orders: tuple[int, ...] = (1, 2),
    include_self: bool = True,
) -> np.ndarray:
    """The mean over the tokens that come after the n tokens which the query ends; 0 for none.

    An n-gram lies within one document, without padding between its tokens.
    """
    assert causal
    x, tokens = inputs["x"], inputs["tokens"].astype(int)
    ids = np.zeros(tokens.shape, int) if segment_ids is None else segment_ids
    out = np.zeros((*tokens.shape, len(orders), x.shape[-1]))

    def ngram(b: int, end: int, n: int, document: np.integer) -> list[int] | None:
        inside = end >= n and all(ids[b, end - n : end] == document) and document >= 0
        return tokens[b, end - n : end].tolist() if inside else None

    for b in range(len(tokens)):
        for o, n in enumerate(orders):
            before = [ngram(b, j, n, ids[b, j]) for j in range(tokens.shape[1])]
            for t in range(tokens.shape[1]):
                last = ngram(b, t + 1, n, ids[b, t])
                found = [
                    j
                    for j in range(t + include_self)
                    if last is not None and before[j] == last and ids[b, j] == ids[b, t]
                ]
                if found:
                    out[b, t, o] = x[b, found].mean(axis=0)
    return out


def softplus_attention(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    power: float | None = None,
) -> np.ndarray:
    """LSSA, or LSSAR with a power: lengths count the visible keys, flat rows stay as they are."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n, head, seen in _queries(q, k, segment_ids, causal):
        keys, query = k[b, seen, head], q[b, t, n]
        lengths = np.sqrt(np.sum(keys**2, axis=-1) + 1e-12) * np.sqrt(query @ query + 1e-12)
        scores = np.log(q.shape[-1]) * np.log(seen.size) * (keys @ query) / lengths
        weights = np.logaddexp(scores, 0)
        weights /= weights.sum()
        if power is not None:
            excess = np.maximum(seen.size * weights - (seen.size > 3), 0)
            if excess.max() > 1e-5:
                weights = excess**power / np.sum(excess**power)
        out[b, t, n] = weights @ v[b, seen, head]
    return out


def hyper_attention(
    inputs: Inputs,
    segment_ids: np.ndarray | None,
    *,
    causal: bool = True,
    planes: Callable[[int], np.ndarray],
    sample: Callable[[float, int, int], np.ndarray],
    block_size: int,
    min_seq_len: int,
    strict: bool = True,
) -> np.ndarray:
    """Documents by leaves and pairs of segments; keys count once, S/m a sample, or not at all.

    `sample(seed, draw_id, S)` gives the sampled places among S sorted keys.
    """
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    normals, s = planes(q.shape[-1]), min_seq_len
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        ids = np.zeros(q.shape[1]) if segment_ids is None else segment_ids[b]
        for document in np.unique(ids[ids >= 0]):
            tokens = np.flatnonzero(ids == document)
            queries, keys, values = (x[b, tokens, n * x.shape[2] // q.shape[2]] for x in (q, k, v))
            rank = _gray_ranks(queries, normals), _gray_ranks(keys, normals)
            T, place = len(tokens), np.arange(len(tokens))
            pairs = []  # of queries and keys, with what their samples are drawn from
            if causal:
                is_exact = (place[:, None] // s == place // s) & (place[:, None] >= place)
                span = s
                while span < T:
                    for first in range(span, T, 2 * span):
                        reading = range(first, min(first + span, T))
                        pairs.append((reading, range(first - span, first), first // s))
                    span *= 2
            else:
                is_exact = np.full((T, T), s >= T)
                pairs = [(range(T), range(T), 0)] if s < T else []
            times = is_exact.astype(np.float64)
            for reading, read, draw_id in pairs:
                drawn = sample(inputs["seeds"][b, n], draw_id, len(read))
                _estimate(times, *rank, reading, read, drawn, block_size, strict)
            scores = queries @ keys.T / np.sqrt(q.shape[-1])
            weights = times * np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, tokens, n] = weights @ values / weights.sum(axis=1, keepdims=True)
    return out


def _estimate(times, query_rank, key_rank, reading, read, drawn, block_size, strict) -> None:
    """Fills in how often each key counts for each query: its block, and samples from elsewhere."""
    S = len(read)
    by_rank = sorted(read, key=lambda j: (key_rank[j], j))
    for nth, i in enumerate(sorted(reading, key=lambda i: (query_rank[i], i))):
        if strict:
            below = sum(key_rank[j] < query_rank[i] for j in read)
            block = min(below // block_size, (S - 1) // block_size)
        else:
            block = nth // -(-block_size * len(reading) // S)
        times[i, by_rank[block * block_size : (block + 1) * block_size]] = 1
        for place in drawn:
            if place // block_size != block:
                times[i, by_rank[place]] += S / len(drawn)


def _gray_ranks(x: np.ndarray, planes: np.ndarray) -> list[int]:
    sequence = [t ^ (t >> 1) for t in range(2 ** planes.shape[1])]
    codes = (x @ planes > 0) @ 2 ** np.arange(planes.shape[1])
    return [sequence.index(code) for code in codes.tolist()]


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def _visible(
    b: int, t: int, length: int, segment_ids: np.ndarray | None, causal: bool
) -> np.ndarray:
    keys = np.arange(t + 1 if causal else length)
    if segment_ids is None:
        return keys
    ids = segment_ids[b]
    return keys[(ids[keys] == ids[t]) & (ids[keys] >= 0)]


def _queries(
    q: np.ndarray, k: np.ndarray, segment_ids: np.ndarray | None, causal: bool
) -> Iterator[tuple[int, int, int, int, np.ndarray]]:
    """Every query that sees anything: (b, t, n, its key head, the keys it sees)."""
    group = q.shape[2] // k.shape[2]
    for b, t in np.ndindex(*q.shape[:2]):
        seen = _visible(b, t, k.shape[1], segment_ids, causal)
        if seen.size:
            for n in range(q.shape[2]):
                yield b, t, n, n // group, seen
