"""What a training was started with: kept beside its trail, and compared later."""

import json

import keras
from absl import app

from keras_sparsity.files import written_whole
from keras_sparsity.replicas import all_workers_have, is_chief

# Where things are, what is shown, and how the same is computed. All other flags decide
# what comes out: `--epochs`, since the learning rate is divided at parts of them, and
# `--strategy`, by which images are left out and batch statistics are gathered.
FREE = {
    "output",
    "resume",
    "data_dir",
    "download",
    "virtual_devices",  # their number is compared, of whatever kind they are
    "jit_compile",
    "verbose",
    "curve",
}


def claim(directory, settings, model, resume):
    """Makes sure that what `directory` holds, and will hold, is of one training.

    The chief keeps the settings there, in `settings.json`; the other workers must find
    their own.

    Args:
        directory: Path of the directory of the trails.
        settings: Dict of all flags, and of what else decides.
        model: A model, by which the workers know each other.
        resume: Whether to go on with a training that is there.
    """
    path = directory / "settings.json"
    settings = {k: v for k, v in settings.items() if k not in FREE}
    settings["KERAS_BACKEND"] = keras.backend.backend()
    if is_chief(model):
        if path.exists():
            if not resume:
                raise app.UsageError(
                    f"--output={directory} holds a training already: take another "
                    "directory. (--resume goes on with one that was started with it.)"
                )
            _check(path, settings)
        else:
            with written_whole(path) as beside:
                beside.write_text(json.dumps(settings, indent=2) + "\n")
    all_workers_have(model, 0)  # waits for the chief
    if not path.exists():
        raise app.UsageError(
            "--output must be a directory that all workers see. Received: "
            f"{directory}, in which the first worker's {path.name} is not."
        )
    _check(path, settings)


def _check(path, settings):
    """Raises an error that names the flags which are not those in `path`."""
    found = json.loads(path.read_text())
    differences = [
        f"{name}={found.get(name)} there, {name}={settings.get(name)} here"
        for name in sorted({*found, *settings})
        if found.get(name) != settings.get(name)
    ]
    if differences:
        raise app.UsageError(
            f"'{path}' is that of a training with other settings: take another "
            f"--output, or the same settings. {'; '.join(differences)}."
        )
