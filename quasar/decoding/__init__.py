"""The decode loop and its parts: drafts, acceptance rules, sampling, stop criteria."""
