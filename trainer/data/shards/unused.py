"""What a source holds and its samples do not use: counted by reason and named, never passed over in silence."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mixmae.trainer.data.faults import first_names


@dataclass
class Unused:
    """Counts files that no sample uses. Instances of several processes are merged."""

    counts: Counter[str] = field(default_factory=Counter)
    """Files by reason, such as `.json files`, that are left out on purpose."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first names of each reason in `counts`."""
    most_examples: int = 3
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each file whose content is not there although its name is."""

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.most_examples:
            examples.append(name)

    def add_unreadable(self, reason: str, name: str) -> None:
        self.unreadable.append((name, reason))

    def merge(self, other: "Unused") -> None:
        for reason, names in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += names[: max(0, self.most_examples - len(mine))]
        self.counts.update(other.counts)
        self.unreadable += other.unreadable

    def all(self) -> Iterator[tuple[str, str]]:
        """Names and reasons; of what is left out on purpose the first `most_examples` of each reason."""
        for reason, names in self.examples.items():
            yield from ((name, reason) for name in names)
        yield from self.unreadable

    def lines(self) -> Iterator[str]:
        """A line for each reason: how many, why, and the first names."""
        for reason, count in self.counts.most_common():
            yield f"not used: {count} {reason}: {first_names(self.examples[reason], count=count)}"
        reasons = Counter(reason for _, reason in self.unreadable)
        for reason, count in reasons.most_common():
            names = [name for name, why in self.unreadable if why == reason]
            yield f"cannot be read: {count} {reason}: {first_names(names)}"

    def report(self) -> None:
        """Says so on standard error."""
        for line in self.lines():
            print(line, file=sys.stderr)


def is_junk(name: str) -> bool:
    """Whether a file is hidden, lies in a hidden folder (`.ipynb_checkpoints`), or was left by an archiver of macOS
    (`__MACOSX`, `._0001.jpg`)."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))
