"""The only room with ray: controller, anchors, run actors, step hosts, and the client that reaches them."""
