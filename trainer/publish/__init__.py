"""From what training changed to a committed version: changed rows, parts, program, gate, publisher."""
