"""Templates and words of the bundled task `notes`, written for this project.

{x} is what the message is about ("three red hats"), {d} the day the note must give and {e}
another day that it must not give.
"""

# ruff: noqa: SIM905 - a line of words is easier to read and to extend than a list of strings

NUMBERS = "two three four five six seven eight nine ten twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow tonight".split()
NAMES = "Anna Ben Clara David Ella Felix Grace Henry Jonas Kate Leo Mara Nina Oscar Rosa Simon".split()
GREETINGS = ("", "", "", "Hello! ", "Hi! ", "Good morning. ", "Good evening! ", "Hello again. ")
CLOSINGS = ("", "", "", " Thank you!", " Thanks.", " Best wishes, {name}.", " Yours, {name}.")
QUALITIES = "red blue small large old plain sweet warm round little white green soft fresh new".split()

# Things of a kitchen, a journey and a shop, in that order.
THINGS = (
    "cakes pies loaves tarts soups apples plums eggs cheeses puddings pears onions nuts melons "
    "biscuits carrots lemons potatoes "
    "tickets rooms seats beds boats cabins cars horses bags maps tables benches carts tents "
    "trunks wagons "
    "coats hats shirts lamps chairs clocks mirrors cups plates knives baskets blankets candles "
    "books pens bottles boxes ropes brushes bells"
).split()

# Of the twelve templates of a kind, eight are for training, two for validation, two for testing.
TEMPLATES = {
    "order": (
        "Could we have {x} for {d}?",
        "I would like to order {x} for {d}.",
        "Please send me {x} by {d}.",
        "We need {x} for {d}.",
        "Can you put {x} aside for me? I will come on {d}.",
        "My order for {d} is {x}.",
        "We shall want {x} on {d}, please.",
        "I want to buy {x}, to be fetched on {d}.",
        "Please order {x} for us, we need them by {d}.",
        "Can I have {x} on {d}?",
        "For {d} we would like {x}, please.",
        "Please have {x} sent to us by {d}.",
    ),
    "cancel": (
        "Please cancel {x} for {d}.",
        "We no longer need {x} on {d}.",
        "I must cancel my order of {x} for {d}.",
        "Sorry, we do not want {x} for {d} any more.",
        "Please strike out {x} for {d}, we no longer want them.",
        "About {x} for {d}: please cancel them.",
        "There is no need for {x} on {d} any more.",
        "I do not need {x} for {d} after all.",
        "Sorry, I have to cancel {x} for {d}.",
        "For {d} we no longer want {x}.",
        "Please cancel our order for {d}, it was {x}.",
        "We do not need {x} any more on {d}.",
    ),
    "move": (
        "Please move {x} from {e} to {d}.",
        "Could you bring {x} on {d} and not on {e}?",
        "We asked for {x} on {e}, but {d} would be better.",
        "Can {x} be moved to {d}? We are away on {e}.",
        "I must change the day for {x} from {e} to {d}.",
        "Instead of {e}, please bring {x} on {d}.",
        "Not {e} but {d} is the right day for {x}.",
        "Please change {x} from {e} to {d}.",
        "I would like to move {x} from {e} to {d}.",
        "Could {x} come on {d} instead of {e}?",
        "Can you change {x} to {d}? We are away on {e}.",
        "We need to move {x} from {e} to {d}, please.",
    ),
    "ask": (
        "Do you still have {x} for {d}?",
        "What is the price of {x} on {d}?",
        "How much would {x} cost on {d}?",
        "Are there {x} left for {d}?",
        "I wonder whether there will be {x} on {d}.",
        "Is it true that you have {x} left on {d}?",
        "Can you tell me the price of {x} for {d}?",
        "Will there still be {x} on {d}?",
        "Do you have {x} left on {d}?",
        "How much are {x} for {d}?",
        "Are there still {x} on {d}?",
        "Can you tell me how much {x} cost on {d}?",
    ),
    "fault": (
        "On {d} we found that {x} were broken.",
        "The {x} you sent on {d} were broken.",
        "There was something wrong with {x} on {d}.",
        "We got {x} on {d} and all of them were bad.",
        "I am not happy with {x} that came on {d}.",
        "The {x} from {d} were in a bad state.",
        "Of the order that came on {d}, {x} were broken.",
        "We were not happy on {d}, {x} were wrong.",
        "The {x} that came on {d} were bad.",
        "There was something wrong on {d}: {x} were broken.",
        "We got {x} on {d} and they were broken.",
        "I am not happy, on {d} you sent {x} in a bad state.",
    ),
}
TEMPLATE_SPLITS = {"train": slice(0, 8), "validation": slice(8, 10), "test": slice(10, 12)}
