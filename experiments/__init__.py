"""The bench: builds objects, trains, measures, writes. Everything in results/ comes from here."""
