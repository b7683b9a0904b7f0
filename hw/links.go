package hw

import "context"

// links reads the interfaces that have a device behind them. The names are
// listed each time, since a modem comes and goes; which of them are virtual is remembered.
func (s *Sampler) links(ctx context.Context, physical map[string]bool) map[string]Link {
	p := s.prober
	type answer struct {
		links    map[string]Link
		physical map[string]bool
	}
	known := make(map[string]bool, len(physical))
	for name, is := range physical {
		known[name] = is
	}
	a, err := within(ctx, p.limit, p.root+" links", func() answer {
		found := map[string]Link{}
		for _, name := range p.list("sys/class/net") {
			dir := "sys/class/net/" + name
			is, asked := known[name]
			if !asked {
				kind := p.count(dir + "/type")
				is = kind != 0 && kind != linkLoopback && p.exists(dir+"/device")
				known[name] = is
			}
			if changes, err := p.integer(dir + "/carrier_changes"); is && err == nil && changes >= 0 {
				found[clean(name)] = Link{Up: p.flag(dir + "/carrier"), Changes: uint64(changes)}
			}
		}
		return answer{found, known}
	})
	if err != nil {
		return nil
	}
	for name, is := range a.physical {
		physical[name] = is
	}
	if len(a.links) == 0 {
		return nil
	}
	return a.links
}
