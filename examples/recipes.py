"""The published experiments, as settings of `train.py`.

`python examples/train.py --recipe=halo_vgg_cifar10` runs one. A recipe gives the flags
other defaults; what the command says stays.
"""

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """The settings of one experiment.

    Attributes:
        experiment: What is published, and where.
        stated: Flags of `train.py` that the paper or its authors' code gives.
        ours: Flags that they do not give, or not in these terms: our choice.
        notes: Why a choice is as it is.
    """

    experiment: str
    stated: dict[str, Any]
    ours: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def settings(self):
        return self.stated | self.ours


def describe(name, value):
    """What a recipe sets, which of it is published, and what the command changed.

    Args:
        name: A key of `RECIPES`.
        value: Function of the name of a flag: its value in this run.
    """
    recipe = RECIPES[name]
    lines = [f"Recipe {name}: {recipe.experiment}"]
    for origin, settings in (("paper", recipe.stated), ("our choice", recipe.ours)):
        for flag, given in settings.items():
            changed = "" if value(flag) == given else " (changed by the command)"
            lines.append(f"  {flag:18} {value(flag)!s:24} {origin}{changed}")
    return "\n".join(lines + [f"  {note}" for note in recipe.notes])


HALO = "Seto, Wells, Zhang, HALO, arXiv 2008.10183"
HALO_DECAY = (
    "weight_decay: the authors decay by 1e-4 within the gradient, which momentum 0.9 "
    "multiplies by 10; Keras decays by 1e-3 outside of it to the same effect."
)
HALO_SCALES = (
    "scale_decay: the authors' weight decay acts on the scales too, and at xi = psi = "
    "1e-8 is what moves them."
)

HALO_MNIST = {
    "method": "halo",
    "dataset": "mnist",
    "epochs": 250,
    "batch_size": 100,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "sparsity_optimizer": "sgd",
    "multiplier": 1.0,
    "drops": ["0.16667", "0.33333", "0.5", "0.66667", "0.83333"],
    "finetune_epochs": 0,
}
HALO_MNIST_OURS = {
    "xi": 3e-7,
    "psi": 5e-4,
    "scale_decay": 0.0,
    "sparsity": 0.95,
    "curve": ["0.9", "0.95", "0.98", "0.99"],
    "validation_split": 0.02,
}
HALO_MNIST_NOTES = (
    "drops: every 25,000 of the 150,000 steps, as a part of them: 2 % of the images "
    "are held out. In the authors' code both schedules are of the weights' optimizer, "
    "so that their rate drops twice each time, and that of the scales never.",
    "xi, psi: good for LeNet-300-100 on Fashion-MNIST in 10 epochs. The authors "
    "give some in an appendix; their code pulls on biases too.",
)

HALO_CIFAR = {
    "method": "halo",
    "augment": "crop_flip",
    "epochs": 160,
    "batch_size": 64,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "drops": ["0.5", "0.75"],
    "scale_decay": 1e-4,
    "sparsity_optimizer": "sgd",
    "filters": "^(?!logits$)",
    "finetune_epochs": 0,
}
HALO_CIFAR_OURS = {
    "weight_decay": 1e-3,
    "multiplier": 1.0,
    "validation_split": 0.02,
}

LTP = "Azarian et al., Learned Threshold Pruning, arXiv 2003.00075"
LTP_PAPER = {"method": "ltp", "dataset": "imagenet2012"}
LTP_OURS = {
    "augment": "random_resized_crop",
    "image_size": 224,
    "validation_split": 0.02,
    "optimizer": "sgd",
    "momentum": 0.9,
    "drops": ["0.5", "0.75"],
    "weight_decay": 0.0,
    "threshold_units": "variance",
    "temperature": 1e-2,
    "initial_threshold": 0.0,
    "steer": True,
    "sparsity_optimizer": "sgd",
    "multiplier": 1.0,
    "batch_size": 256,
}
LTP_EPOCHS = {"epochs": 18, "finetune_epochs": 12}
LTP_NOTES = (
    "l0: that of LeNet-300-100 at a like sparsity, over the ratio of the numbers of "
    "weights; not measured on ImageNet.",
    "steer: l0 is where it begins, and is led to the sparsity.",
    "threshold_units: the paper's thresholds are absolute, but no learning rate of "
    "theirs is known that serves every layer.",
    "sparsity: the published compression, as zeros among the kernels.",
)
LTP_KERAS = {"pretrain_epochs": 0, "weights": "imagenet", "learning_rate": 0.01}
KERAS_NOTE = "weights: the paper starts from a trained network too, of other weights."
LTP_DENSE = {"pretrain_epochs": 90, "learning_rate": 0.01}
DENSE_NOTE = (
    "pretrain_epochs: the paper starts from a trained network. Keras has no weights of "
    "this one; --weights=FILE --pretrain_epochs=0 starts from your own."
)

RECIPES = {
    "halo_lenet300_mnist": Recipe(
        f"LeNet-300-100 on MNIST ({HALO})",
        HALO_MNIST | {"model": "lenet_300_100"},
        HALO_MNIST_OURS,
        HALO_MNIST_NOTES,
    ),
    "halo_lenet5_mnist": Recipe(
        f"LeNet-5 on MNIST ({HALO})",
        HALO_MNIST | {"model": "lenet5"},
        HALO_MNIST_OURS,
        HALO_MNIST_NOTES,
    ),
    "halo_vgg_cifar10": Recipe(
        f"VGG-like on CIFAR-10 ({HALO})",
        HALO_CIFAR
        | {"model": "vgg_like", "dataset": "cifar10", "xi": 1e-8, "psi": 1e-8},
        HALO_CIFAR_OURS | {"sparsity": 0.95, "curve": ["0.7", "0.8", "0.9", "0.95"]},
        (HALO_DECAY, HALO_SCALES),
    ),
    "halo_resnet50_cifar100": Recipe(
        f"The ResNet of 50 layers for small images on CIFAR-100 ({HALO})",
        HALO_CIFAR
        | {
            "model": "cifar_resnet50",
            "dataset": "cifar100",
            "sparsity": 0.95,
            "curve": ["0.7", "0.95"],
        },
        HALO_CIFAR_OURS | {"xi": 1e-8, "psi": 1e-8},
        (
            HALO_DECAY,
            HALO_SCALES,
            "xi, psi: those of VGG-like. Published: 70.70 % at 70 % zeros, 65.57 % at "
            "95 %.",
        ),
    ),
    "ltp_resnet50_imagenet": Recipe(
        f"ResNet50, 9.1 times smaller, top-5 92.0 % ({LTP})",
        LTP_PAPER | LTP_EPOCHS | {"model": "ResNet50", "sparsity": 1 - 1 / 9.1},
        LTP_OURS | LTP_KERAS | {"l0": 1e-8},
        (KERAS_NOTE, *LTP_NOTES),
    ),
    "ltp_alexnet_imagenet": Recipe(
        f"AlexNet, 26.4 times smaller, top-5 79.1 % ({LTP})",
        LTP_PAPER | {"model": "alexnet", "sparsity": 1 - 1 / 26.4},
        LTP_OURS | LTP_EPOCHS | LTP_DENSE | {"l0": 4e-8},
        (
            "model: torchvision's variant, whose dense top-5 is 79.1 % too.",
            DENSE_NOTE,
            *LTP_NOTES,
        ),
    ),
    "ltp_mobilenetv2_imagenet": Recipe(
        f"MobileNetV2, 1.33 times smaller, less than 1 % of top-1 lost ({LTP})",
        LTP_PAPER | {"model": "MobileNetV2", "sparsity": 1 - 1 / 1.33},
        LTP_OURS | LTP_EPOCHS | LTP_KERAS | {"l0": 1e-8},
        (KERAS_NOTE, *LTP_NOTES),
    ),
    "ltp_efficientnetb0_imagenet": Recipe(
        f"EfficientNet-B0, 3 times smaller, less than 1 % of top-1 lost ({LTP})",
        LTP_PAPER | {"model": "EfficientNetB0", "sparsity": 1 - 1 / 3},
        LTP_OURS | LTP_EPOCHS | LTP_KERAS | {"l0": 2e-8},
        (KERAS_NOTE, *LTP_NOTES),
    ),
    "ltp_mixnets_imagenet": Recipe(
        f"MixNet-S, 2 times smaller, less than 1 % of top-1 lost ({LTP})",
        LTP_PAPER | {"model": "mixnet_s", "sparsity": 0.5},
        LTP_OURS | LTP_EPOCHS | LTP_DENSE | {"learning_rate": 0.05, "l0": 2e-8},
        (DENSE_NOTE, *LTP_NOTES),
    ),
}
