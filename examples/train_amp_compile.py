"""The loop of train.py with automatic mixed precision and torch.compile, on a GPU if there is one.

python examples/train_amp_compile.py
"""

import torch
from torch import nn
from train import block, scans

from lslpn_kernels import GridSpec, LocalPrototypeHead


class Network(nn.Module):
    """Encoder and head in one module, which is compiled into one graph."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Conv2d(64, 64, 3, padding=1)
        self.encoder = nn.Sequential(block(1, 32), block(32, 64), last)
        self.head = LocalPrototypeHead(GridSpec(scale=1 / 2), logit_scale=20.0)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss for images [B, 2, 1, H, W] (a support and a query each) and label maps."""
        B = images.shape[0]
        features = self.encoder(images.flatten(0, 1)).unflatten(0, (B, 2))
        # Under autocast the features are bfloat16; the head still computes in float32.
        support, query = features[:, :1], features[:, 1:]
        return self.head.loss(support, labels[:, :1], query, labels[:, 1:], num_classes=2)


def main(steps: int = 60, backend: str = "inductor") -> list[float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = Network().to(device)
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        images, labels = (t.to(device).unflatten(0, (4, 2)) for t in scans(8))
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
