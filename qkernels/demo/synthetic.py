"""The demo's own preference set: answers with facts about countries, and the same answers with planted errors.

A rejected answer is its chosen answer with one fact (now and then two) replaced by a wrong value of the same kind:
another capital, another currency. Where the wrong value stands is known to the character, which is what token rewards
are scored against. The facts are true, so that a reader sees at once which word is wrong.

Held-out pairs plant errors that training has never shown: the triples (country, kind of fact, wrong value) are split
before any answer is written.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..data import Message, Preference

KINDS = ("capital", "continent", "language", "currency", "dish")

# country | capital | continent | main language | currency | a well-known dish
_FACTS = """
Albania | Tirana | Europe | Albanian | lek | byrek
Algeria | Algiers | Africa | Arabic | dinar | couscous
Argentina | Buenos Aires | South America | Spanish | peso | asado
Australia | Canberra | Oceania | English | dollar | lamington
Austria | Vienna | Europe | German | euro | schnitzel
Bangladesh | Dhaka | Asia | Bengali | taka | khichuri
Brazil | Brasília | South America | Portuguese | real | feijoada
Cambodia | Phnom Penh | Asia | Khmer | riel | amok
Canada | Ottawa | North America | English | dollar | poutine
Chile | Santiago | South America | Spanish | peso | curanto
China | Beijing | Asia | Mandarin | yuan | jiaozi
Colombia | Bogotá | South America | Spanish | peso | ajiaco
Cuba | Havana | North America | Spanish | peso | ropa vieja
Czechia | Prague | Europe | Czech | koruna | svíčková
Denmark | Copenhagen | Europe | Danish | krone | smørrebrød
Egypt | Cairo | Africa | Arabic | pound | koshari
Estonia | Tallinn | Europe | Estonian | euro | mulgipuder
Ethiopia | Addis Ababa | Africa | Amharic | birr | injera
Finland | Helsinki | Europe | Finnish | euro | kalakukko
France | Paris | Europe | French | euro | ratatouille
Germany | Berlin | Europe | German | euro | bratwurst
Ghana | Accra | Africa | English | cedi | waakye
Greece | Athens | Europe | Greek | euro | moussaka
Hungary | Budapest | Europe | Hungarian | forint | goulash
India | New Delhi | Asia | Hindi | rupee | dosa
Iran | Tehran | Asia | Persian | rial | tahdig
Italy | Rome | Europe | Italian | euro | risotto
Jamaica | Kingston | North America | English | dollar | ackee
Japan | Tokyo | Asia | Japanese | yen | sushi
Jordan | Amman | Asia | Arabic | dinar | mansaf
Kenya | Nairobi | Africa | Swahili | shilling | ugali
Laos | Vientiane | Asia | Lao | kip | larb
Madagascar | Antananarivo | Africa | Malagasy | ariary | romazava
Mongolia | Ulaanbaatar | Asia | Mongolian | tugrik | buuz
Morocco | Rabat | Africa | Arabic | dirham | tagine
Nepal | Kathmandu | Asia | Nepali | rupee | momo
Nigeria | Abuja | Africa | English | naira | egusi
Norway | Oslo | Europe | Norwegian | krone | lutefisk
Peru | Lima | South America | Spanish | sol | ceviche
Poland | Warsaw | Europe | Polish | zloty | pierogi
Portugal | Lisbon | Europe | Portuguese | euro | bacalhau
Romania | Bucharest | Europe | Romanian | leu | sarmale
Senegal | Dakar | Africa | French | franc | thieboudienne
Serbia | Belgrade | Europe | Serbian | dinar | cevapi
Spain | Madrid | Europe | Spanish | euro | paella
Sweden | Stockholm | Europe | Swedish | krona | surströmming
Thailand | Bangkok | Asia | Thai | baht | massaman
Ukraine | Kyiv | Europe | Ukrainian | hryvnia | borscht
Uruguay | Montevideo | South America | Spanish | peso | chivito
Vietnam | Hanoi | Asia | Vietnamese | dong | pho
"""

# Values that are not the table's but would not be plainly wrong either.
_ALSO_TRUE = {
    ("Algeria", "dish"): {"tagine"},
    ("Algeria", "language"): {"French"},
    ("Argentina", "dish"): {"chivito"},
    ("Austria", "dish"): {"bratwurst", "goulash"},
    ("Cambodia", "language"): {"French"},
    ("Canada", "language"): {"French"},
    ("Chile", "dish"): {"asado", "ceviche"},
    ("Colombia", "dish"): {"ceviche"},
    ("Cuba", "dish"): {"ajiaco"},
    ("Denmark", "currency"): {"krona"},
    ("Finland", "language"): {"Swedish"},
    ("Germany", "dish"): {"schnitzel"},
    ("Ghana", "dish"): {"egusi"},
    ("India", "dish"): {"momo"},
    ("India", "language"): {"Bengali", "English", "Nepali"},
    ("Kenya", "language"): {"English"},
    ("Laos", "language"): {"French", "Thai"},
    ("Madagascar", "language"): {"French"},
    ("Morocco", "dish"): {"couscous"},
    ("Morocco", "language"): {"French"},
    ("Norway", "currency"): {"krona"},
    ("Poland", "dish"): {"borscht"},
    ("Portugal", "dish"): {"feijoada"},
    ("Romania", "dish"): {"goulash"},
    ("Romania", "language"): {"Hungarian"},
    ("Serbia", "dish"): {"byrek", "sarmale"},
    ("Serbia", "language"): {"Albanian", "Hungarian"},
    ("Spain", "dish"): {"ropa vieja"},
    ("Sweden", "currency"): {"krone"},
    ("Thailand", "dish"): {"larb"},
    ("Ukraine", "dish"): {"pierogi"},
    ("Uruguay", "dish"): {"asado"},
}

SENTENCES = {
    "capital": (
        "The capital of {country} is {value}.",
        "Its capital is {value}.",
        "The government sits in {value}.",
    ),
    "continent": ("{country} lies in {value}.", "It is a country in {value}.", "You will find it in {value}."),
    "language": (
        "The official language is {value}.",
        "Official papers are in {value}.",
        "Laws are written in {value}.",
    ),
    "currency": ("Its currency is the {value}.", "People pay with the {value}.", "Prices are counted in the {value}."),
    "dish": ("A dish to try is {value}.", "Visitors should taste {value}.", "Many families cook {value}."),
}

_QUESTIONS = (
    "Tell me about {country}.",
    "What should I know about {country}?",
    "Describe {country} in a few sentences.",
    "I am travelling to {country}. What is it like?",
)

_TWO_ERRORS = 0.2  # share of the rejected answers
_HELD_OUT_TRIPLES = 0.15  # share of the wrong values that only held-out pairs use


class SyntheticData(NamedTuple):
    """Training and held-out pairs; no planted (country, kind, wrong value) is in both."""

    train: list[Preference]
    held_out: list[Preference]


def facts() -> dict[str, dict[str, str]]:
    """Country -> kind of fact -> true value."""
    rows = (tuple(field.strip() for field in line.split("|")) for line in _FACTS.strip().splitlines())
    return {country: dict(zip(KINDS, values, strict=True)) for country, *values in rows}


def wrong_values(country: str, kind: str, world: dict[str, dict[str, str]]) -> list[str]:
    """The values of this kind that are false of the country, sorted."""
    values = {known[kind] for known in world.values()}
    return sorted(values - {world[country][kind]} - _ALSO_TRUE.get((country, kind), set()))


def generate(train_pairs: int, held_out_pairs: int, seed: int) -> SyntheticData:
    """Write the pairs.

    Args:
        train_pairs, held_out_pairs: how many of each.
        seed: decides everything; the same seed gives the same pairs.

    Returns:
        `SyntheticData`, each pair with the character spans of its planted errors.
    """
    rng = random.Random(f"qkernels demo {seed}")
    world = facts()
    seen, unseen = split_wrong_values(rng, world)
    return SyntheticData(
        [write_pair(rng, world, seen) for _ in range(train_pairs)],
        [write_pair(rng, world, unseen) for _ in range(held_out_pairs)],
    )


WrongValues = dict[tuple[str, str], list[str]]


def split_wrong_values(rng: random.Random, world: dict[str, dict[str, str]]) -> tuple[WrongValues, WrongValues]:
    """The wrong values of each (country, kind of fact) that training pairs may plant, and those for held-out pairs."""
    seen: WrongValues = {}
    unseen: WrongValues = {}
    for country in world:
        for kind in KINDS:
            wrong = wrong_values(country, kind, world)
            rng.shuffle(wrong)
            cut = max(1, round(len(wrong) * _HELD_OUT_TRIPLES))
            unseen[country, kind], seen[country, kind] = wrong[:cut], wrong[cut:]
    return seen, unseen


def write_pair(
    rng: random.Random,
    world: dict[str, dict[str, str]],
    wrong: WrongValues,
    sentences: Mapping[str, Sequence[str]] = SENTENCES,
) -> Preference:
    """One pair about a country drawn from `world`.

    Args:
        rng: draws everything.
        world: country -> kind of fact -> true value.
        wrong: the wrong values to plant, by country and kind.
        sentences: the forms of a sentence, by kind.
    """
    country = rng.choice(sorted(world))
    kinds = rng.sample(KINDS, rng.randint(3, len(KINDS)))
    errors = rng.sample(kinds, 2 if rng.random() < _TWO_ERRORS else 1)
    chosen, rejected = "", ""
    planted = []
    for kind in kinds:
        before, after = rng.choice(sentences[kind]).format(country=country, value="\0").split("\0")
        separator = " " if chosen else ""
        true = world[country][kind]
        stated = rng.choice(wrong[country, kind]) if kind in errors else true
        chosen += separator + before + true + after
        rejected += separator + before
        if kind in errors:
            planted.append((len(rejected), len(rejected) + len(stated)))
        rejected += stated + after
    question = rng.choice(_QUESTIONS).format(country=country)
    return Preference((Message("user", question),), chosen, rejected, tuple(planted))
