"""The models of this stack, by name: what each takes, in which dtype, how many tokens texts have in it, its LoRAs."""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.dispatch.common_stages import CommonStages
from orchestrator.dispatch.lora_book import LoraBook
from orchestrator.job import ModelKey
from orchestrator.settings import ModelSettings
from orchestrator.storage.job_store import Store
from protocol.errors import BadRequest, NotFound
from protocol.job import JobRequest, Recipe
from protocol.messages.describer import DescriberHello
from protocol.messages.worker import WorkerHello
from protocol.model import ModelDescription
from protocol.model_spec import WITH, Choice, with_added
from protocol.recipe import texts_to_count
from protocol.route import Route, Template, encoded_key, whole_key
from protocol.stages import Stage

CALLED: Mapping[Choice, str] = {"controlnet": "ControlNet", "refiner": "refiner"}


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

    name: str  # by which jobs name it
    description: ModelDescription
    dtype: str
    speedups: tuple[str, ...]
    tokens: Tokens = field(default_factory=Tokens, compare=False)
    routes: Routes = field(default_factory=Routes, compare=False)
    loras: LoraBook = field(default_factory=LoraBook, compare=False)

    @property
    def key(self) -> ModelKey:
        return ModelKey.of(self.description.revision, self.dtype, self.speedups)

    def uncounted(self, requests: Sequence[JobRequest]) -> list[str]:
        """Texts of which the describer must say how many tokens they have, before the requests can be judged."""
        texts = [text for request in requests for text in texts_to_count(request, self.description)]
        return [text for text in dict.fromkeys(texts) if text not in self.tokens]


class Catalogue:
    """The models of the stack, each known once its describer has found it; the first one is the default."""

    def __init__(
        self,
        store: Store,
        models: Sequence[ModelSettings] = (ModelSettings(),),
        common: CommonStages | None = None,
    ) -> None:
        self._store = store
        self.models = {model.name: model for model in models}
        self._default = models[0].name
        self._entries: dict[str, CatalogueEntry] = {}
        self.common = common or CommonStages()

    def learn(self, hello: WorkerHello | DescriberHello) -> None:
        """Add a model that is there, or another revision or dtype of it."""
        name = hello.name if isinstance(hello, DescriberHello) and hello.name in self.models else self._default
        entry = CatalogueEntry(name, hello.model, hello.dtype, hello.speedups)
        if self._entries.get(name) != entry:
            self._entries[name] = entry
            self._see_common()
            self._store.remember_model(hello.model)

    def add(self, model: ModelSettings) -> None:
        """Add a model that is known once its describer has found it."""
        self.models[model.name] = model

    def is_known(self, name: str) -> bool:
        return name in self._entries

    def with_choices(self, name: str) -> list[str]:
        """Return the names of a model with each of what its jobs choose among."""
        return [other for other, settings in self.models.items() if settings.chosen and other.startswith(name + WITH)]

    def remove(self, name: str) -> None:
        del self.models[name]
        self._entries.pop(name, None)
        self._see_common()

    def _see_common(self) -> None:
        self.common.learn((entry.key, entry.description.worker_digests) for entry in self._entries.values())

    @property
    def default_name(self) -> str:
        return self._default

    @property
    def entries(self) -> Collection[CatalogueEntry]:
        """The models that are known."""
        return self._entries.values()

    @property
    def known(self) -> CatalogueEntry | None:
        """The default model, once it is known."""
        return self._entries.get(self._default)

    def default(self) -> CatalogueEntry:
        """The default model; NotFound while it is not known."""
        return self.entry("")

    def entry(self, model: str | None) -> CatalogueEntry:
        """Return the model that a request names; NotFound where there is none, or while it is not known."""
        if (entry := self._entries.get(self.name(model))) is None:
            raise NotFound("No worker has joined yet, so the model is not known.")
        return entry

    def entry_for(self, request: JobRequest) -> CatalogueEntry:
        """Return the model that a request is for; as `name_for`, and NotFound while it is not known."""
        return self.entry(self.name_for(request))

    def name_for(self, request: JobRequest) -> str:
        """Return the name of the model that a request is for, with the ControlNet or the refiner that it chooses.

        NotFound; BadRequest where it is to choose one, or chooses two.
        """
        name = self.name(request.model)
        if request.controlnet is not None and request.refiner is not None:
            raise BadRequest("A ControlNet and a refiner don't go together.", "Choose one of them.")
        if request.controlnet is not None:
            return self._chosen(name, "controlnet", request.controlnet)
        if request.refiner is not None:
            return self._chosen(name, "refiner", request.refiner)
        alone = self._entries.get(name)
        takes_none = alone and not (alone.description.control or alone.description.controlled)
        if request.control is not None and takes_none and (nets := self._choices(name, "controlnet")):
            hint = ", ".join(f"--controlnet {net}" for net in nets)
            raise BadRequest("A control image is for a ControlNet.", f"Choose one: {hint}.")
        return name

    def _chosen(self, name: str, kind: Choice, alias: str) -> str:
        """Return the name of a model with what a job chooses; NotFound."""
        if alias not in (there := self._choices(name, kind)):
            hint = f"Those of {name}: {', '.join(there)}." if there else f"{name} has none to choose among."
            raise NotFound(f"There is no {CALLED[kind]} {alias!r}.", hint)
        return with_added(name, alias)

    def _choices(self, name: str, kind: Choice) -> list[str]:
        """Return the names of what a model's jobs choose among."""
        mine = [full for full in self.with_choices(name) if self.models[full].chosen == kind]
        return [full.removeprefix(name + WITH) for full in mine]

    def name(self, model: str | None) -> str:
        """Return the name of the model that a request names by it, or as the stack was told of it; NotFound."""
        if not model:
            return self._default
        if model in self.models:
            return model
        plain = [name for name, settings in self.models.items() if not settings.chosen]
        found = [name for name in plain if self.models[name].model == model]
        found += [name for name in plain if (e := self._entries.get(name)) and e.description.model == model]
        if not found:
            there = ", ".join(name for name in self.models if name) or "one alone, which needs no name"
            raise NotFound(f"There is no model {model!r} in this stack.", f"Its models: {there}.")
        return found[0]

    def of(self, key: ModelKey) -> CatalogueEntry | None:
        """Return the model that a job or a worker is of; None where the stack has no such model now."""
        return next((entry for entry in self._entries.values() if entry.key == key), None)

    def settings(self, key: ModelKey) -> ModelSettings:
        """Return what the stack was told of the model that a worker is of; nothing where it has no such model."""
        entry = self.of(key)
        if entry is None:
            return self.models[self._default] if len(self.models) == 1 else ModelSettings()
        return self.models[entry.name]
