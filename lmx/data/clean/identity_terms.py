"""Words by which texts name who people are, and words and turns of dialects, by group.

An entry is a term's forms, the first naming it, in lower case: `man|men`. A form of several words matches over spaces and hyphens. Where a word
alone mostly means something else (black, white, old, straight) only its forms beside a word for people count. After the lists of Dixon et al.
2018 (Measuring and mitigating unintended bias in text classification), Dodge et al. 2021 (Documenting large webtext corpora) and, for African
American English, the features in Blodgett, Green and O'Connor 2016 and Green 2002.
"""

from collections.abc import Mapping

PEOPLE = (
    "people",
    "person",
    "persons",
    "man",
    "men",
    "woman",
    "women",
    "girl",
    "girls",
    "boy",
    "boys",
    "community",
    "communities",
    "folks",
)


def _people(*adjectives: str, alone: bool = False) -> tuple[str, ...]:
    """A term for each adjective: it beside a word for people, or also alone."""
    return tuple("|".join(([word] if alone else []) + [f"{word} {noun}" for noun in PEOPLE]) for word in adjectives)


TERMS: Mapping[str, tuple[str, ...]] = {
    "gender": (
        "woman|women", "man|men", "girl|girls", "boy|boys", "female|females", "male|males", "she|her|hers|herself", "he|him|his|himself",
        "mother|mothers|mom|mum", "father|fathers|dad", "daughter|daughters", "son|sons", "wife|wives", "husband|husbands",
        "non-binary|nonbinary|enby|genderqueer", "transgender|trans people|trans person|trans man|trans men|trans woman|trans women",
    ),
    "orientation": (
        "gay|gays", "lesbian|lesbians", "bisexual|bisexuals", "queer|queers", "homosexual|homosexuals", "heterosexual|heterosexuals",
        "asexual|asexuals", "pansexual", "lgbt|lgbtq|lgbtqia", *_people("straight"),
    ),
    "religion": (
        "christian|christians|christianity", "catholic|catholics|catholicism", "protestant|protestants", "evangelical|evangelicals",
        "muslim|muslims|moslem|moslems|islam|islamic", "sunni|sunnis",
        "shia|shias|shiite|shiites", "jew|jews|jewish|judaism", "hindu|hindus|hinduism",
        "buddhist|buddhists|buddhism", "sikh|sikhs|sikhism", "mormon|mormons", "atheist|atheists|atheism",
    ),
    "ethnicity": (
        "african american|african americans|afro-american|afro-americans", "asian american|asian americans",
        "european american|european americans|caucasian|caucasians", "native american|native americans|american indian|american indians",
        "hispanic|hispanics|latino|latinos|latina|latinas|latinx", "aboriginal|aboriginals|aborigines|indigenous", "roma people|romani|romanies",
        "arab|arabs|arabic", "asian|asians", "african|africans", "european|europeans", "middle eastern", *_people("black", "white", "brown"),
    ),
    "nationality": (
        "american|americans", "mexican|mexicans", "canadian|canadians", "british|briton|britons", "irish", "french", "german|germans",
        "italian|italians", "spanish|spaniards", "polish", "russian|russians", "ukrainian|ukrainians", "turkish|turks", "iranian|iranians",
        "iraqi|iraqis", "syrian|syrians", "israeli|israelis", "palestinian|palestinians", "saudi|saudis", "afghan|afghans",
        "pakistani|pakistanis", "indian|indians", "bangladeshi|bangladeshis", "chinese", "japanese", "korean|koreans", "vietnamese",
        "filipino|filipinos|filipina|filipinas", "indonesian|indonesians", "nigerian|nigerians", "kenyan|kenyans", "ethiopian|ethiopians",
        "somali|somalis", "egyptian|egyptians", "brazilian|brazilians", "cuban|cubans", "haitian|haitians",
        "immigrant|immigrants|migrant|migrants", "refugee|refugees|asylum seeker|asylum seekers",
    ),
    "disability": (
        "disabled|disability|disabilities", "blind people|blind person|blind man|blind woman|visually impaired",
        "deaf|hard of hearing|hearing impaired", "wheelchair|wheelchairs",
        "autistic|autism", "dyslexic|dyslexia", "epileptic|epilepsy", "down syndrome", "paralyzed|paralysed|paraplegic|quadriplegic",
        "mental illness|mentally ill", "schizophrenic|schizophrenia", "bipolar", "cerebral palsy",
    ),
    "age": (
        "elderly", "senior citizen|senior citizens|pensioner|pensioners", "teenager|teenagers|teen|teens|teenage|adolescent|adolescents",
        "child|children|kid|kids", "baby|babies|infant|infants", "middle aged", "millennial|millennials", "boomer|boomers",
        "grandmother|grandmothers|grandma|granny", "grandfather|grandfathers|grandpa", *_people("old", "older", "young"),
    ),
    "dialect": (
        "aae: ain't|aint", "aae: finna|fixing to|fixin to", "aae: y'all|yall", "aae: tryna", "aae: imma|i'ma|ima", "aae: gon",
        "aae: bruh|bro|fam", "aae: deadass", "aae: talmbout|talkin bout", "aae: dat|dem|dis|dey", "aae: wassup|whassup", "aae: nuffin|sumn|nothin",
        "aae: iont|ion know",
        # habitual be, remote been, completive done, existential it's, after Green 2002
        "aae: he be|she be|they be|we be|i be|you be", "aae: been knew|been had|been knowing|been told",
        "aae: done told|done went|done got|done did|done had", "aae: ain't no|aint no|ain't nobody|don't nobody|can't nobody",
        "scots: cannae|dinnae|wisnae|didnae|couldnae", "scots: wee|aye|bairn|bairns|lassie|laddie",
        "southern: might could|might should|used to could", "caribbean: mi deh|unu|nuh|inna", "singlish: lah|leh|lor|sia",
        "indian: do the needful|prepone|cousin brother|cousin sister|good name",
    ),
}  # fmt: skip
"""Groups and their terms. A term of a dialect says which before a colon."""
