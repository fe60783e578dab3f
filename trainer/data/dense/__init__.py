"""Images whose objects or pixels are labelled: annotations, and the crops that boxes, masks and label maps follow."""
