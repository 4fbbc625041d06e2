"""Cut Noto Sans CJK down to the characters of the screens, in the forms of mainland China.

python screens/make_font.py NotoSansCJKtc-Regular.otf

Needs fontTools; the wheel cvttf-notosanscjk-regular has the whole font.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

HERE = Path(__file__).resolve().parent
TARGET = HERE / "NotoSansSC-screens.otf"
WORDS = ("words.yaml", "screen_kinds.py")
SIMPLIFIED = "ZHS "


def characters() -> set[str]:
    """All that a screen may say."""
    texts = [(HERE / name).read_text(encoding="utf-8") for name in WORDS]
    return {*string.printable, *"".join(texts)} - {*string.whitespace} | {" "}


def simplified_forms(font: TTFont) -> dict[str, str]:
    """The glyphs that simplified Chinese has in the place of others."""
    table = font["GSUB"].table
    systems = [each for script in table.ScriptList.ScriptRecord for each in script.Script.LangSysRecord]
    features = {number for each in systems if each.LangSysTag == SIMPLIFIED for number in each.LangSys.FeatureIndex}
    records = [table.FeatureList.FeatureRecord[number] for number in sorted(features)]
    lookups = [number for each in records if each.FeatureTag == "locl" for number in each.Feature.LookupListIndex]
    found: dict[str, str] = {}
    for number in lookups:
        for part in table.LookupList.Lookup[number].SubTable:
            found |= getattr(part, "ExtSubTable", part).mapping
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("font", type=Path)
    font = TTFont(parser.parse_args().font, recalcTimestamp=False)
    forms = simplified_forms(font)
    for table in font["cmap"].tables:
        if hasattr(table, "cmap"):
            table.cmap = {code: forms.get(name, name) for code, name in table.cmap.items()}
    options = Options()
    options.layout_features, options.hinting, options.desubroutinize = [], False, True
    options.drop_tables += ["vhea", "vmtx", "VORG", "BASE", "GSUB", "GPOS"]
    subsetter = Subsetter(options)
    subsetter.populate(text="".join(characters()))
    subsetter.subset(font)
    font.save(TARGET)


if __name__ == "__main__":
    main()
