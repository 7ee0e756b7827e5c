"""The words that generated samples are made of: our own lists, so that nothing is downloaded."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able amber ample ancient arctic ashen autumn azure bare basic bitter blank bleak blithe blond
    blunt bold brass brave brief bright brisk broad bronze brown bulky busy calm candid careful
    cheap civil clear clever close cloudy coarse cobalt cold common copper coral cosmic cozy
    crimson crisp cubic curly curved cyan daily damp dark dawning deep dense dim distant dizzy dry
    dual dusty eager early earnest eastern easy ebony elastic empty equal even exact faint fair
    famous fancy fast fertile fierce final fine firm first flat fluent foggy formal fragile frank
    free fresh frosty frozen full fuzzy gentle giant glad glassy global glossy golden grand granite
    grassy grave great green grey hairy happy hardy harsh hasty hazel heavy hidden high hollow
    honest humble humid icy ideal idle inner ivory jade joint jolly keen kind large last late lazy
    lean level light linear lively local lofty lone long loose loud loyal lucky lunar maple marble
    meek mellow merry mild minor misty mobile modern modest mossy muddy mute narrow neat nimble
    noble northern novel oaken odd olive open outer oval pale patient perfect pink plain polar
    """
)

NOUNS = _words(
    """
    acorn actor anchor anvil apple apron arrow atlas badger bakery balcony bamboo banjo barley barn
    basket beacon beaver bell bench bishop blanket boat bonnet border bottle boulder bridge brook
    broom bucket butter button cabin cable camel candle canoe canvas carpet castle cavern cellar
    chain chapel cherry chisel cinder circle cliff clock cloud clover coach cobbler comet compass
    cotton crane crater cricket crown crystal curtain dagger daisy dancer desert dial diamond dragon
    drawer drum duchess eagle easel echo elbow elder ember engine falcon farmer feather fennel ferry
    fiddle field finch flag flask flute forest fossil fountain fox galaxy garden garlic gate geyser
    glacier glove goblet goose grape gravel hammer harbor harp hatchet hawk hazelnut hedge helmet
    herald heron hill honey hornet hotel island jacket jaguar jewel journal juniper kettle kitchen
    kite ladder lagoon lantern lark lemon lever lichen lily lobster locket lodge magnet mantle
    market marsh meadow medal melon mill mirror monk moon moth mountain museum nettle nest nutmeg
    oak ocean olive orchard otter oven owl oyster paddle palace panther paper parrot pasture
    pebble pencil pepper piano pilot pine plum pocket pond poplar portal prairie quarry quill rabbit
    """
)

# Repeated between the needles; nothing in it is ever asked for.
NOISE = (
    "The road is long. The water is cold. A lamp burns in the hall. Rain falls on the roof. "
    "Then it is quiet again."
)

FIRST_NAMES = _words(
    """
    Ada Anton Bela Berta Carl Clara Dana David Edith Egon Fanny Felix Greta Gustav Hanna Hugo Ida
    Ivan Jana Jonas Karin Klaus Lena Leo Mara Max Nadia Nils Olga Oskar Paula Peter Rita Robert
    Sara Simon Tilda Tomas Vera Viktor
    """
)

TRADES = _words(
    """
    baker barber baron binder brewer builder butcher carpenter clerk cook cooper dentist doctor
    driver drummer dyer editor fisher glazier grocer hatter hunter jeweller joiner judge lawyer
    mason miller miner nurse painter pilot plumber potter printer sailor singer smith tailor weaver
    """
)

# Three of them, one after another, are an invented name.
SYLLABLES = _words(
    """
    ba bel bor da del dor fa fen gal gor ha hel il ka kel kor la len lim lor ma mel mir mor na nel
    nim nor o pa pel pir ra rel rim ros sa sel sim sor ta tel tim tor u va vel vim vor wen yal yor
    za zel zim zor
    """
)
