"""Shapes of the parameters of well-known models, in the order of ``model.parameters()``."""

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """161 tensors, 25,557,032 elements: torchvision's, for ImageNet's 1000 classes."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:  # the shortcut changes the number of channels
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def gpt2() -> Shapes:
    """148 tensors, 124,439,808 elements: the small one, its output layer tied to its embedding."""
    width = 768
    shapes: Shapes = [(50257, width), (1024, width)]
    for _ in range(12):
        shapes += [(width,), (width,)]
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,)]
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [*shapes, (width,), (width,)]
