"""The command `plugins`: list the schedules, weightings, predictions, samplers and decoders."""

from __future__ import annotations

from lit_diffusion import DECODERS, PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS

__all__ = ["Plugins", "plugins"]


class Plugins(dict[str, list[type]]):
    """The classes of each family, by the name of its base; as text, one line per class."""

    def __str__(self) -> str:
        packages = {cls: cls.__module__.partition(".")[0] for cs in self.values() for cls in cs}
        wide = max(map(len, packages.values()), default=0)
        lines = []
        for base, classes in self.items():
            lines.append(base)
            for cls in classes:
                summary = (cls.__doc__ or "").strip().partition("\n")[0]
                lines.append(f"  {cls.__name__:22} {packages[cls]:{wide}} {summary}")
            lines.append("")
        return "\n".join(lines)


def plugins() -> Plugins:
    """List every schedule, weighting, prediction, sampler and decoder.

    This includes those of installed plug-in packages and of the modules imported so far.

    Example:
        >>> [cls.__name__ for cls in plugins()["Prediction"]][:2]
        ['EDMPrediction', 'EpsPrediction']
    """
    families = (SCHEDULES, WEIGHTINGS, PREDICTIONS, SAMPLERS, DECODERS)
    return Plugins({family.base.__name__: family.classes() for family in families})
