package coordinator

func (c *Coordinator) configRoutes() []route { return nil }
