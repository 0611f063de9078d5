"""The head in your own training loop, with any encoder (here a small convolutional one).

    python examples/train.py

The images are a bright disc (the organ) on noise, so the loss falls visibly within seconds.
"""

import torch
from torch import nn

from lslpn_kernels import GridSpec, LocalPrototypeHead


def block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def scans(n: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, H, W] and label maps [n, H, W]: 0 background, 1 organ."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = size * (0.4 + 0.2 * torch.rand(n, 2, 1, 1))
    labels = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < (size / 6) ** 2).long()
    return labels[:, None] + 0.7 * torch.randn(n, 1, size, size), labels


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    encoder = nn.Sequential(block(1, 32), block(32, 64), nn.Conv2d(64, 64, 3, padding=1))
    head = LocalPrototypeHead(GridSpec(scale=1 / 2), logit_scale=20.0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        images, labels = scans(8)
        features = encoder(images).unflatten(0, (4, 2))  # 4 episodes of a support and a query
        labels = labels.unflatten(0, (4, 2))
        support, query = features[:, :1], features[:, 1:]
        # Label maps are passed as they are. The loss is cross-entropy at image resolution; its
        # logits, head(support, labels[:, :1], query, num_classes=2), are never stored.
        loss = head.loss(support, labels[:, :1], query, labels[:, 1:], num_classes=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
