package hw

import (
	"context"
	"net"
)

// Types of links, from <linux/if_arp.h>.
const (
	linkEthernet = 1
	linkLoopback = 772
)

func (p *prober) network(context.Context) (func(*Inventory), notes) {
	var missing notes
	found := []Interface{}
	for _, name := range p.list("sys/class/net") {
		dir := "sys/class/net/" + name
		kind := p.count(dir + "/type")
		if kind == 0 || kind == linkLoopback { // 0: a file such as bonding_masters
			continue
		}
		n := Interface{
			Name:     clean(name),
			Kind:     linkKind(p.tree, dir, kind),
			MAC:      p.word(dir + "/address"),
			BurnedIn: p.word(dir+"/addr_assign_type") == "0", // NET_ADDR_PERM
			Up:       p.flag(dir + "/carrier"),
			MTU:      int(min(p.count(dir+"/mtu"), 1<<20)),
		}
		// The speed is -1, or cannot be read, without a link or where it has no meaning.
		if v, err := p.integer(dir + "/speed"); err == nil && v > 0 {
			if v > 1_000_000 {
				missing.add("network", NoteImplausible, n.Name, "the speed that its driver gives is not plausible and was dropped")
			} else {
				n.SpeedMbps = int(v)
			}
		}
		if p.live() {
			n.Addresses = addressesOf(name)
		}
		found = append(found, n)
	}
	return func(inv *Inventory) { inv.Network = found }, missing
}

func linkKind(t tree, dir string, kind uint64) string {
	switch {
	case !t.exists(dir + "/device"):
		return "virtual"
	case t.exists(dir+"/wireless") || t.exists(dir+"/phy80211"):
		return "wifi"
	case kind == linkEthernet:
		return "ethernet"
	default:
		return "other"
	}
}

// addressesOf lists an interface's addresses; none if it went away meanwhile.
func addressesOf(name string) []string {
	ifc, err := net.InterfaceByName(name)
	if err != nil {
		return nil
	}
	addrs, err := ifc.Addrs()
	if err != nil {
		return nil
	}
	var list []string
	for _, a := range addrs {
		list = append(list, a.String())
	}
	return list
}
