"""The models of this stack, by name: what each takes, in which dtype, and how many tokens texts have in it."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.dispatch.lora_book import LoraBook
from orchestrator.storage.job_store import Store
from protocol.errors import NotFound
from protocol.job import JobRequest, Recipe
from protocol.messages.describer import DescriberHello
from protocol.messages.worker import WorkerHello
from protocol.model import ModelDescription
from protocol.recipe import texts_to_count
from protocol.route import Route, Template, encoded_key, whole_key
from protocol.stages import Stage


class Tokens:
    """The numbers of tokens of the last texts that the describer has counted."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._counts: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._counts

    def count(self, text: str) -> int:
        """Return a text's number of tokens; 0 where nobody has counted, in a stack without a describer."""
        return self._counts.get(text, 0)

    def learn(self, texts: Sequence[str], counts: Sequence[int]) -> None:
        for text, count in zip(texts, counts, strict=True):
            self._counts[text] = count
            self._counts.move_to_end(text)
        while len(self._counts) > max(self._most, len(texts)):
            self._counts.popitem(last=False)


@dataclass(frozen=True, slots=True)
class KnownRoute:
    """A route, and what workers have shown of it."""

    route: Route
    following: Stage | None = None  # the stage after the first visit of the text stage; None: unknown
    fits: bool = True  # that visit makes as many calls as it says, as far as was seen

    def text_key(self, recipe: Recipe) -> str:
        """Return the key of what the first visit of the text stage leaves."""
        return encoded_key(self.route, recipe) if self.route.encoded and self.fits else whole_key(recipe)


class Routes:
    """The routes of the last templates that the describer has looked at."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._known: OrderedDict[Template, KnownRoute] = OrderedDict()

    def get(self, template: Template | None) -> KnownRoute | None:
        return self._known.get(template) if template else None

    def learn(self, template: Template, route: Route) -> None:
        """Take in what the describer has found."""
        self._put(template, KnownRoute(route, route.following))

    def seen(self, template: Template | None, following: Stage, calls: int, learns: bool = True) -> bool:
        """Take in what a first visit of the text stage has shown, if it `learns`; return whether the route says so."""
        known = self._known.get(template) if template else None
        if template is None or known is None:
            return False
        fits = calls == known.route.calls
        if learns and (following, fits) != (known.following, known.fits):
            self._put(template, KnownRoute(known.route, following, fits))
        return fits

    def _put(self, template: Template, known: KnownRoute) -> None:
        self._known[template] = known
        self._known.move_to_end(template)
        while len(self._known) > self._most:
            self._known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model as this stack runs it."""

    description: ModelDescription
    dtype: str
    speedups: tuple[str, ...]
    tokens: Tokens = field(default_factory=Tokens, compare=False)
    routes: Routes = field(default_factory=Routes, compare=False)


class Catalogue:
    """The models that were told of; a request that names none is for the default, which was told of last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.loras = LoraBook()
        self._entries: dict[str, CatalogueEntry] = {}
        self._default = ""

    def learn(self, hello: WorkerHello | DescriberHello) -> None:
        """Add a model that is there, or another revision or dtype of it."""
        entry = CatalogueEntry(hello.model, hello.dtype, hello.speedups)
        self._default = hello.model.model
        if self._entries.get(self._default) != entry:
            self._entries[self._default] = entry
            self._store.remember_model(hello.model)

    @property
    def known(self) -> CatalogueEntry | None:
        """The default model, once any is there."""
        return self._entries.get(self._default)

    def default(self) -> CatalogueEntry:
        """The default model; NotFound while there is none."""
        if (entry := self.known) is None:
            raise NotFound("No worker has joined yet, so the model is not known.")
        return entry

    def uncounted(self, requests: Sequence[JobRequest]) -> list[str]:
        """Texts of which the describer must say how many tokens they have, before the requests can be judged."""
        if (entry := self.known) is None:
            return []
        texts = [text for request in requests for text in texts_to_count(request, entry.description)]
        return [text for text in dict.fromkeys(texts) if text not in entry.tokens]
