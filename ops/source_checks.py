"""What `warmgate doctor` finds in the places that a profile takes adapters from."""

from __future__ import annotations

from collections.abc import Iterator

from configs.adapters.place import Remote, place_of
from configs.lora import LoraError
from ops.doctor import Finding, Patient


def adapter_sources(patient: Patient) -> Iterator[Finding]:
    """One look at each source, as an ingress would."""
    for source in patient.profile.config.adapter_sources:
        from configs.adapters.remote import UnreachableError, look  # fsspec, which other profiles do without

        place = place_of(source.url)
        assert isinstance(place, Remote), "configs.check has looked"
        try:
            found = look(place, source.timeout_s).folders
        except LoraError as error:
            yield Finding("adapters", "fail", str(error), "install it: pip install 'warmgate[s3]', gcsfs or adlfs")
        except UnreachableError as error:
            advice = "until it can be read, its adapters neither come nor go"
            yield Finding("adapters", "warn", str(error), advice)
        else:
            beyond = len(found) - source.max_adapters
            if beyond > 0:
                advice = f"raise adapter_sources max_adapters: {beyond} are passed over"
                yield Finding("adapters", "warn", f"{source.url} has {len(found)} folders", advice)
            else:
                yield Finding("adapters", "ok", f"{source.url}: {len(found)} folders, checked when they are loaded")
