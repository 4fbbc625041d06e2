"""Texts in many scripts, by which two tokenizers are compared."""

import unicodedata

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? We'll see; they've said I'm right.",
    "Größere Straßen führen über Österreich — „natürlich“, sagte er.",
    "L'été dernier, où étiez-vous ? À la plage, çà et là…",
    "¿Qué pasó mañana? ¡El niño comió piñas en el jardín!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Fahiş bluz güvencesi yağdırma projesi çöktü. İstanbul'da ışık.",
    "我能吞下玻璃而不伤身体。今天是2024年3月15日，星期五！",
    "いろはにほへと ちりぬるを、カタカナもあります。東京都千代田区１−１",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "นายสังฆภัณฑ์ เฮงพิทักษ์ฝั่ง ผู้เฒ่าซึ่งมีอาชีพเป็นฅนขายฃวด",
    "הקפד לשמור על קשר עם חברים, גם כשאתה עסוק.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ٣٤٥",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले विष्णुवतार।",
    "আমি বাংলায় গান গাই, ১২৩ টাকা দাম।",
    "எனக்கு தமிழ் தெரியும். அவர் நாளை வருவார்.",
    "მიყვარს ქართული ენა და ღვინო.",
    "Խելացի մարդը միշտ լսում է։",
    "ሰላም ለዓለም ሁሉ ይሁን።",
    "Tôi có thể ăn thủy tinh mà không hại gì. Đường phố Hà Nội",
    "Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.",
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\" if x != 0x1F else '\\n'\n",
    "for (int i = 0; i < n; ++i) { a[i] += b->c[i] & ~0xFFu; } // done\r\n",
    "SELECT * FROM users WHERE id IN (1, 22, 333, 4444, 55555) AND name LIKE '%O''Brien%';",
    "1234567890 3.14159 -2.5e-10 1,000,000 00:00:01 +49 (0)30 123-456",
    "https://example.org/path?q=1&lang=de#top user@mail.example <b>HTML</b> &amp;",
    "😀👍🏽👨‍👩‍👧‍👦🇩🇪 emoji ✓ → ∞ ≠ ½ ² ₃ Ⅷ ①",
    "\t tab\t\ttabs  two   three    four\n\n\nnewlines \n \n mixed \r\n end   ",
    "CamelCaseWords snake_case_words kebab-case-words SCREAMING_CASE mixed123numbers456",
    "\u200bzero\u200dwidth\u00a0nbsp\u3000ideographic\ufeffbom",
    '{"key": [1, 2.0, null, true], "näme": "välue\\u00e9"}',
)


def sample_texts() -> list[str]:
    """A few hundred texts, in the normal form NFC: llama.cpp normalises nothing, and text is written so."""
    found: dict[str, None] = {"": None, " ": None, "\n": None, "  \n\n  ": None}
    for sentence in SENTENCES:
        words = sentence.split(" ")
        variants = (
            sentence,
            f" {sentence}",
            f"{sentence}\n\n{sentence}",
            sentence.upper(),
            sentence.lower(),
            "".join(words),
            "  ".join(words),
            "\n".join(words),
            " ".join(f"{word}{number}" for number, word in enumerate(words)),
            sentence[len(sentence) // 3 :],
        )
        found |= dict.fromkeys(unicodedata.normalize("NFC", variant) for variant in variants)
    return list(found)
