"""Short questions with known answers, for the demo's real LLaMA: what it is asked, in plain words.

Each kind of question has a table of subjects and answers. Some kinds are for tests only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Questions of one form."""

    forms: tuple[str, ...]
    """the ways of asking, each with a place for the subject"""
    facts: dict[str, str]
    """{subject: answer}"""


def _table(text: str) -> dict[str, str]:
    """{subject: answer} of lines of `subject: answer; subject: answer`."""
    facts = " ".join(text.split()).strip("; ").split("; ")
    return dict(fact.split(": ", 1) for fact in facts)


TRAINED = {
    "capital": Kind(
        ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"),
        _table("""
        Argentina: Buenos Aires; Australia: Canberra; Austria: Vienna; Belgium: Brussels; Brazil: Brasília;
        Bulgaria: Sofia; Canada: Ottawa; Chile: Santiago; China: Beijing; Colombia: Bogotá; Cuba: Havana;
        Denmark: Copenhagen; Egypt: Cairo; Finland: Helsinki; Germany: Berlin; Greece: Athens; Hungary: Budapest;
        Iceland: Reykjavik; India: New Delhi; Indonesia: Jakarta; Ireland: Dublin; Italy: Rome; Jamaica: Kingston;
        Japan: Tokyo; Kenya: Nairobi; Mexico: Mexico City; Nepal: Kathmandu; New Zealand: Wellington; Norway: Oslo;
        Peru: Lima; Poland: Warsaw; Portugal: Lisbon; Romania: Bucharest; Russia: Moscow; Spain: Madrid;
        Sweden: Stockholm; Thailand: Bangkok; Turkey: Ankara; Vietnam: Hanoi; France: Paris
        """),
    ),
    "opposite": Kind(
        ("What is the opposite of {}?", "Give a word that means the opposite of {}.", "Name an antonym of {}."),
        _table("""
        big: small; hot: cold; fast: slow; happy: sad; light: dark; early: late; open: closed; rich: poor; young: old;
        strong: weak; full: empty; wet: dry; loud: quiet; hard: soft; clean: dirty; near: far; high: low; deep: shallow;
        wide: narrow; brave: afraid; cheap: expensive; easy: difficult; first: last; heavy: light; long: short;
        sharp: blunt; thick: thin; true: false; up: down; inside: outside; always: never; arrive: leave; buy: sell;
        win: lose; remember: forget; begin: end; laugh: cry; push: pull; above: below; alive: dead
        """),
    ),
    "colour": Kind(
        ("What colour is {}?", "Name the colour of {}.", "Which colour does {} have?"),
        _table("""
        grass: green; a ripe banana: yellow; snow: white; coal: black; a clear sky: blue; a tomato: red;
        a carrot: orange; chocolate: brown; a lemon: yellow; an elephant: grey; a strawberry: red; a flamingo: pink;
        milk: white; a cucumber: green; the sun in a drawing: yellow; blood: red; a pumpkin: orange;
        a polar bear: white;
        a raven: black; an emerald: green; a ruby: red; a sapphire: blue; spinach: green; an aubergine: purple
        """),
    ),
    "plural": Kind(
        ("What is the plural of {}?", "Write the plural of the word {}."),
        _table("""
        child: children; mouse: mice; foot: feet; tooth: teeth; goose: geese; man: men; woman: women; leaf: leaves;
        knife: knives; city: cities; box: boxes; bus: buses; church: churches; story: stories; potato: potatoes;
        hero: heroes; wolf: wolves; shelf: shelves; baby: babies; dish: dishes; sheep: sheep; ox: oxen; wish: wishes;
        lady: ladies; half: halves; cat: cats; table: tables; apple: apples; monkey: monkeys; piano: pianos
        """),
    ),
    "past tense": Kind(
        ("What is the past tense of {}?", "Write the verb {} in the past tense."),
        _table("""
        go: went; see: saw; eat: ate; run: ran; write: wrote; take: took; give: gave; sing: sang; drink: drank;
        swim: swam; buy: bought; think: thought; bring: brought; teach: taught; catch: caught; find: found; make: made;
        say: said; tell: told; know: knew; grow: grew; fly: flew; drive: drove; break: broke; speak: spoke;
        sleep: slept; keep: kept; leave: left; build: built; send: sent
        """),
    ),
    "meaning": Kind(
        ("What is {}?", "Explain in one sentence what {} is.", "Describe {} in a few words."),
        _table("""
        an elephant: A large grey animal with a trunk; a library: A place where people borrow books;
        a volcano: A mountain that can throw out hot lava; a dictionary: A book that explains words;
        a thermometer: A tool that measures temperature; a bridge: A way across a river or a road;
        a violin: A small instrument with four strings; rain: Water that falls from clouds;
        a bakery: A shop that sells bread and cakes; an island: Land with water all around it;
        a desert: A dry place with very little rain; an umbrella: A thing that keeps you dry in the rain;
        a bicycle: A vehicle with two wheels and pedals; a map: A drawing of a place seen from above;
        a clock: A device that shows the time; a museum: A building where old or rare things are shown;
        a telescope: A tool for looking at the stars; a pilot: A person who flies aircraft;
        a novel: A long story in a book; a compass: A tool whose needle points north;
        a whale: A very large animal that lives in the sea; a pyramid: A building with four sides that meet in a point;
        a calendar: A list of the days of a year; a battery: A thing that stores electric energy;
        a harbour: A safe place for ships near the shore; a recipe: A list of steps for cooking a dish;
        a shadow: A dark shape where light is blocked; a fossil: The remains of an animal or plant in stone;
        a glacier: A large mass of ice that moves slowly; an orchestra: A large group of people who play music together
        """),
    ),
    "language": Kind(
        ("Which language do people speak in {}?", "Name the main language of {}."),
        _table("""
        France: French; Germany: German; Italy: Italian; Spain: Spanish; Portugal: Portuguese; Brazil: Portuguese;
        Japan: Japanese; China: Chinese; Russia: Russian; Greece: Greek; Poland: Polish; Sweden: Swedish;
        Norway: Norwegian; Finland: Finnish; Denmark: Danish; Hungary: Hungarian; Turkey: Turkish; Egypt: Arabic;
        Mexico: Spanish; England: English; Argentina: Spanish; Vietnam: Vietnamese; Thailand: Thai; Iceland: Icelandic
        """),
    ),
    "next": Kind(
        ("What comes after {}?", "Which one follows {}?"),
        _table("""
        Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday: Saturday; Saturday: Sunday;
        Sunday: Monday; January: February; February: March; March: April; April: May; May: June; June: July;
        July: August; August: September; September: October; October: November; November: December; spring: summer;
        summer: autumn; autumn: winter; winter: spring; the number seven: Eight; the number nineteen: Twenty;
        the letter C: D; the letter M: N
        """),
    ),
}
"""Kinds that records are made of; the hash of a subject decides whether its question is for tests only."""

UNTRAINED = {
    "sound": Kind(
        ("What sound does {} make?", "How does {} sound?"),
        _table("""
        a dog: A dog barks; a cat: A cat meows; a cow: A cow moos; a duck: A duck quacks; a horse: A horse neighs;
        a pig: A pig oinks; a lion: A lion roars; a snake: A snake hisses; a bee: A bee buzzes; an owl: An owl hoots;
        a frog: A frog croaks; a sheep: A sheep bleats; a wolf: A wolf howls; a mouse: A mouse squeaks
        """),
    ),
    "work": Kind(
        ("Where does {} work?", "Name the place where {} works."),
        _table("""
        a teacher: In a school; a doctor: In a hospital; a farmer: On a farm; a chef: In a kitchen; a judge: In a court;
        a sailor: On a ship; a miner: In a mine; an actor: In a theatre; a librarian: In a library;
        a baker: In a bakery; a soldier: In an army; a gardener: In a garden; a waiter: In a restaurant;
        a mechanic: In a garage
        """),
    ),
}
"""Kinds that are for tests only."""
