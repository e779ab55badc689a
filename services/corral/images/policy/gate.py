"""May this image have this name here, and may it be used under it?"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from corral.images import catalog
from corral.images.catalog import ImageRecord
from corral.images.digest import Digest
from corral.images.policy import proofs, rules
from corral.images.policy.keys import PublicKey, load_key
from corral.images.policy.rules import Kind, Rule
from corral.images.reference import Reference, parse_reference
from corral.rpc.errors import InvalidArgument, PermissionDenied
from corral.store import Snapshot


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of the images of a repository."""

    rule: Rule
    keys: tuple[PublicKey, ...] = ()

    @property
    def kind(self) -> Kind:
        return self.rule.type

    def signed_name(self, reference: Reference) -> str:
        """What signatures must call its repository."""
        return self.rule.signed_name(reference.repository)

    def is_met(self, snapshot: Snapshot, reference: Reference, digests: Collection[Digest]) -> bool:
        """Whether a key of it is known to have signed one of them. With a digest in the name, that decides."""
        tag, keys = "" if reference.digest else reference.tag, [key.id for key in self.keys]
        return proofs.is_proven(snapshot, digests, self.signed_name(reference), tag, keys)

    def refusal(self, name: str, digest: Digest | None, why: str) -> PermissionDenied:
        """digest: None where it is not known yet."""
        shown = f"{name or 'without a name'}{f' ({digest})' if digest and digest not in name else ''}"
        return PermissionDenied(
            f"image {shown} is refused by the policy for {self.rule.pattern}: {why}",
            reason="IMAGE_REFUSED",
            metadata={"image": name, "digest": digest or "", "policy": self.rule.pattern},
        )


NOTHING = Demand(Rule(rules.EVERYTHING, Kind.ACCEPT))


class Gate:
    """Of the settings as the daemon has read them when it started, keys included."""

    def __init__(self, policy: Sequence[Rule]) -> None:
        """Blocking. Raises InvalidArgument for settings that leave anything open, or keys that cannot be used."""
        try:
            rules.check(policy)
            paths = {path for rule in policy for path in rule.keys}
            keys = {path: load_key(path) for path in sorted(paths)}
        except ValueError as e:
            raise InvalidArgument(f"[images] policy: {e}", reason="BAD_POLICY") from e
        self._rules = tuple(policy)
        self._demands = {rule.pattern: Demand(rule, tuple(keys[path] for path in rule.keys)) for rule in policy}

    @property
    def is_open(self) -> bool:
        """Whether there are no rules at all."""
        return not self._rules

    def demand(self, reference: Reference | None) -> Demand:
        """What is asked of images by that name; None: of those that have none."""
        if self.is_open:
            return NOTHING
        return self._demands[rules.rule_for(self._rules, reference.repository if reference else "").pattern]

    def check_name(self, snapshot: Snapshot, reference: Reference | None, target: Digest, manifest: Digest) -> None:
        """Raises PermissionDenied unless the image may have the name. A proof for an index is one for all in it."""
        demand = self.demand(reference)
        if demand.kind is Kind.ACCEPT:
            return
        name = reference.familiar if reference else ""
        if demand.kind is Kind.REJECT:
            raise demand.refusal(name, target, "it takes none")
        if reference is None or not demand.is_met(snapshot, reference, (target, manifest)):
            how = f"`corral pull {name}` does that" if reference else "pull it by a name"
            raise demand.refusal(name, target, f"no signature of it was verified here: {how}")

    def check_use(self, snapshot: Snapshot, record: ImageRecord, text: str) -> None:
        """Raises PermissionDenied unless the image that `text` has found may be used: by that name, by id by any."""
        if not self.is_open:
            self._check_any(snapshot, _asked(snapshot, record, text))

    def check_layer(self, snapshot: Snapshot, namespace: str, chain_id: str) -> None:
        """Raises PermissionDenied unless the layer is the uppermost of an image that may be used."""
        if self.is_open:
            return
        found = catalog.by_chain_id(snapshot, namespace, chain_id)
        if not found and self.demand(None).kind is not Kind.ACCEPT:
            raise PermissionDenied(
                f"snapshot {chain_id} is refused by the policy: it is not of an image that is here",
                reason="IMAGE_REFUSED",
            )
        self._check_any(snapshot, found)

    def _check_any(self, snapshot: Snapshot, records: Sequence[ImageRecord]) -> None:
        problem: PermissionDenied | None = None
        for record in records:
            reference = parse_reference(record.name) if record.name else None
            try:
                self.check_name(snapshot, reference, record.target.digest, record.manifest.digest)
            except PermissionDenied as e:
                problem = problem or e
            else:
                return
        if problem is not None:
            raise problem


def _asked(snapshot: Snapshot, record: ImageRecord, text: str) -> Sequence[ImageRecord]:
    try:
        reference = parse_reference(text)
    except InvalidArgument:
        reference = None
    if reference is not None and catalog.by_reference(snapshot, record.namespace, reference) is not None:
        return [record]
    return catalog.by_id(snapshot, record.namespace, record.image_id)
