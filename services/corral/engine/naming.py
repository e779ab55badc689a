"""Names for containers that were given none: two words, as "brisk_heron"; and ids."""

import secrets

ADJECTIVES = """
    amber ample azure bold brave brisk bright calm candid chilly civil clever cosmic crisp dapper daring deft dewy
    eager early earnest easy fair famous fancy fertile fine firm fleet fluent fond frank fresh frosty gentle giddy
    glad golden grand hardy hasty hazel honest humble jolly keen kind lively loyal lucid lunar mellow merry mild
    misty modest neat nimble noble polite proud prompt quick quiet rapid ready robust rosy royal rustic serene
    sharp shiny silent silver sincere sleek smart snowy solar solid spry stable steady stout sturdy subtle sunny
    super swift tender tidy tranquil trusty upbeat valiant vivid warm wise witty young zesty
""".split()  # noqa: SIM905 (shorter than a list)
ANIMALS = """
    alpaca antelope badger beaver bison bittern bobcat buffalo camel caribou cheetah civet colt condor coyote
    crane cygnet deer dingo dolphin donkey dove eagle egret eland elk falcon ferret finch foal fox gazelle gecko
    gibbon goat gopher grouse gull hare hawk heifer heron hippo horse ibex ibis impala jackal jaguar kestrel kite
    koala lamb lark lemur leopard llama lynx macaw magpie mare marmot marten mole moose mule mustang newt ocelot
    okapi oriole osprey otter owl ox panda parrot pelican pigeon pika plover pony puffin puma quail rabbit raven
    robin salmon seal serval sheep shrew sparrow stag starling stoat stork swallow swan tapir tern tiger toad
    turtle viper vole walrus weasel whale wolf wombat wren yak zebra
""".split()  # noqa: SIM905 (shorter than a list)


def random_name() -> str:
    """Two words; about 11,000 different ones."""
    return f"{secrets.choice(ADJECTIVES)}_{secrets.choice(ANIMALS)}"


def random_id() -> str:
    """64 hex digits, whose first twelve never are a number only: shown as a hostname, that would read as an address."""
    while True:
        value = secrets.token_hex(32)
        if not value[:12].isdigit():
            return value
