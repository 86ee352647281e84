"""The influence encoder of UnlearnRec: from forgotten edges to new free embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.recsys.graph import Graph, csr, symmetric_product

FORMS = ("release", "paper")
SLOPE = 0.99  # of the leaky ReLUs: nearly linear


class InfluenceGraph:
    """The graph of forgotten edges alone, over the nodes that they touch.

    Args:
        graph: All training edges of the data set.
        edges: Indices of the forgotten edges, int64 [n], in any order, repeats allowed.
        device: Where it is put.

    Attributes:
        nodes: Touched nodes, sorted, users first, int64 [T].
        matrix: D^-1/2 A D^-1/2 of the forgotten edges by their own degrees: symmetric sparse CSR
            [T, T], float32 with int32 indices.
    """

    def __init__(self, graph: Graph, edges: Tensor, device: torch.device | str = "cpu") -> None:
        edges = edges.cpu().unique()  # type: ignore[no-untyped-call]
        # Renumbering keeps the order of edges, so that the small graph needs no sort by user.
        users, user = torch.unique(graph.user[edges], return_inverse=True)
        items, item = torch.unique(graph.item[edges], return_inverse=True)
        small = Graph(len(users), len(items), user.numpy(), item.numpy())
        self.nodes = torch.cat([users, items + graph.users]).to(device)
        self.matrix = small.adjacency().to(device)
        self._turned = small.by_item.to(device)
        self._place = torch.full((graph.nodes,), len(self.nodes), device=device)
        self._place[self.nodes] = torch.arange(len(self.nodes), device=device)

    def __len__(self) -> int:
        return len(self._turned)

    def product(self, x: Tensor) -> Tensor:
        """Return A_d x, [T, d] -> [T, d]."""
        return symmetric_product(self.matrix, x)

    def rows(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Return rows of nodes of the whole graph, [T, d] -> [M, d]; 0 where one is not touched."""
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[self._place[nodes]]

    def thinned(self, rate: float) -> Tensor:
        """Return the matrix with a random share of the edges dropped, both directions together.

        What is left is not scaled up. Drawn from torch's global generator, which the training loop
        seeds.

        Args:
            rate: Probability that an edge is dropped.
        """
        stays = (torch.rand(len(self), device=self.nodes.device) >= rate).float()
        values = self.matrix.values() * torch.cat([stays, stays[self._turned]])
        size = len(self.nodes)
        rows, columns = self.matrix.crow_indices(), self.matrix.col_indices()
        return csr(rows, columns, values, (size, size), self.nodes.device)


class InfluenceEncoder(nn.Module):
    """Maps forgotten edges to new free embeddings: E0' = E0 + MLP(ΔE) (arXiv 2505.22649).

    With A_d the influence graph and W = rate·(η ⊙ E):

    - `release` (the authors' code): ΔE = Σ_{l=0..L} A_d^l H0 - A_d^L W, E the FINAL embeddings of
      the trained model. Layer 0 of H0 reaches every node, also those that no forgotten edge
      touches; rate is 0.1.
    - `paper`: ΔE = A_d^L H0 - A_d^L W, E the free embeddings E0, rate is 1: nothing but touched
      nodes changes.

    The MLP is layers of LeakyReLU(xW + b) with slope 0.99, W the identity and b zero, which the
    release trains only in fine-tuning.

    Args:
        withdrawn: What is withdrawn by the trained model, [N, d]: E above, without gradients.
        layers: Propagation steps L, at least 1.
        eta: Initial value of η: the release takes twice the learning rate.
        form: "release" or "paper".
        withdraw_rate: The factor `rate`; None: 0.1 for `release`, 1 for `paper`.
        mlp_layers: Layers of the MLP.
        train_mlp: Whether the MLP has weights of its own; if not it is identity and bias zero.

    Attributes:
        h0: Learned, [N, d], initially 0.
        eta: Learned, [N, 1].
    """

    withdrawn: Tensor

    def __init__(
        self,
        withdrawn: Tensor,
        layers: int = 3,
        eta: float = 0.002,
        form: str = "release",
        withdraw_rate: float | None = None,
        mlp_layers: int = 2,
        train_mlp: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ConfigError(f"form={form!r} is no influence encoder; accepted: release, paper")
        self.layers = layers
        self.form = form
        usual = 0.1 if form == "release" else 1.0
        self.rate = usual if withdraw_rate is None else withdraw_rate
        self.register_buffer("withdrawn", withdrawn.detach(), persistent=False)
        self.h0 = nn.Parameter(torch.zeros_like(withdrawn))
        self.eta = nn.Parameter(torch.full_like(withdrawn[:, :1], eta))
        self.mlp = NearIdentity(withdrawn.shape[1], mlp_layers, train_mlp)

    def forward(self, influence: InfluenceGraph, table: Tensor) -> Tensor:
        """Return the new free embeddings, [N, d] -> [N, d], with L products.

        Both sums share their products by linearity (Horner's form).

        Args:
            influence: The graph of forgotten edges.
            table: The free embeddings E0, users first.
        """
        return self.updated(table, self.change(influence))

    def updated(self, table: Tensor, change: Tensor) -> Tensor:
        """Return E0 + MLP(ΔE), [N, d]."""
        found: Tensor = table + self.mlp(change)
        return found

    def change(self, influence: InfluenceGraph) -> Tensor:
        """Return ΔE of all nodes, [N, d]."""
        nodes = influence.nodes
        own = self.h0[nodes]
        chain = own - self.removed(nodes)
        for _ in range(self.layers - 1):
            chain = influence.product(chain)
            if self.form == "release":
                chain = own + chain
        return self.spread(influence, influence.product(chain))

    def change_of(self, influence: InfluenceGraph, hops: Sequence[Tensor]) -> Tensor:
        """Return ΔE as `change` does, from layers that `hops` already computed, [N, d]."""
        gone = self.removed(influence.nodes)
        for _ in range(self.layers):
            gone = influence.product(gone)
        kept = torch.stack(list(hops)).sum(0) if self.form == "release" else hops[-1]
        return self.spread(influence, kept - gone)

    def hops(self, influence: InfluenceGraph) -> list[Tensor]:
        """Return A_d^l H0 of the touched nodes for l = 1..L, each [T, d]."""
        found = [influence.product(self.h0[influence.nodes])]
        for _ in range(self.layers - 1):
            found.append(influence.product(found[-1]))
        return found

    def removed(self, nodes: Tensor) -> Tensor:
        """Return W = rate·(η ⊙ E) of some nodes, [M, d]."""
        return self.rate * self.eta[nodes] * self.withdrawn[nodes]

    def spread(self, influence: InfluenceGraph, touched: Tensor) -> Tensor:
        """Return ΔE of all nodes from the propagated part on touched ones, [T, d] -> [N, d]."""
        base = self.h0 if self.form == "release" else torch.zeros_like(self.h0)
        return base.index_add(0, influence.nodes, touched)


class NearIdentity(nn.Module):
    """Layers of LeakyReLU(xW + b) with slope 0.99, W at first the identity and b zero.

    Args:
        dim: Width d.
        layers: Number of layers.
        trained: Whether W and b are parameters; if not, no product with the identity is computed.
    """

    def __init__(self, dim: int, layers: int, trained: bool) -> None:
        super().__init__()
        self.layers = layers
        self.linear = nn.ModuleList()
        for _ in range(layers if trained else 0):
            layer = nn.Linear(dim, dim)
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
            self.linear.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of each row, [..., d]."""
        for k in range(self.layers):
            x = F.leaky_relu(self.linear[k](x) if len(self.linear) else x, SLOPE)
        return x


def contrast_loss(
    influence: InfluenceGraph,
    start: Tensor,
    hops: Sequence[Tensor],
    groups: Sequence[Tensor],
    rate: float,
) -> Tensor:
    """Return L_c: InfoNCE between each hop and the same hop over a thinned influence graph.

    Summed over layers and groups, temperature 1, over a group's own nodes; the clean hop gives no
    gradient. A node that no forgotten edge touches has zero rows, which 1e-8 turns into one
    constant direction, as in the release.

    Args:
        influence: The graph of forgotten edges.
        start: H0 of the touched nodes, [T, d].
        hops: What `InfluenceEncoder.hops` returned.
        groups: Node ids of a batch, one tensor a node type, each id once.
        rate: Share of edges dropped, anew for each layer.
    """
    terms = []
    for before, clean in zip([start, *hops[:-1]], hops, strict=True):
        thin = symmetric_product(influence.thinned(rate), before)
        for nodes in groups:
            # 1e-8 on both sides, and before normalising: rows of zeros must not divide by zero.
            fixed = F.normalize(influence.rows(clean.detach(), nodes) + 1e-8, eps=1e-30)
            moved = F.normalize(influence.rows(thin, nodes) + 1e-8, eps=1e-30)
            # Cosines: exp cannot overflow, so that no pass looks for the largest.
            shares = (fixed @ moved.T).exp().sum(1).log()
            terms.append((shares - (fixed * moved).sum(1)).mean())
    return torch.stack(terms).sum()


def unlearning_loss(scores: Tensor, form: str) -> Tensor:
    """Return L_u of the forgotten edges' scores, [n] -> scalar.

    Args:
        scores: Inner products under the new embeddings.
        form: "v1": mean softplus(s) = -mean log sigmoid(-s); "v2": mean s, unbounded below.
    """
    return F.softplus(scores).mean() if form == "v1" else scores.mean()


def alignment_loss(new: Tensor, old: Tensor) -> Tensor:
    """Return L_p, the squared norm of new - old over the batch: a SUM, as published.

    Args:
        new: Log-shares by `choice`, [B].
        old: The same of the trained model.
    """
    return (new - old).square().sum()


def choice(user: Tensor, item: Tensor, temperature: float, form: str) -> Tensor:
    """Return log(p + 1e-6), p a pair's share among the items of the batch, repeats kept, [B].

    Args:
        user: Final vectors, [B, d].
        item: Final vectors of the users' items, [B, d].
        temperature: T, by which scores are divided.
        form: "v2": p is the softmax of scores, guarded against overflow, unlike the release; "v3":
            softplus stands in place of exp.
    """
    user = user / temperature
    own, every = (user * item).sum(1), user @ item.T
    if form == "v3":
        own, every = _log_softplus(own), _log_softplus(every)
    shares = own - every.logsumexp(1)
    return torch.logaddexp(shares, torch.full_like(shares, 1e-6).log())


def _log_softplus(x: Tensor) -> Tensor:
    """Return log softplus(x); far below 0 softplus is exp, of which the log would underflow."""
    return torch.where(x < -15.0, x, F.softplus(x.clamp(min=-15.0)).log())
