package env

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/nat"
)

// checkPorts objects to ports that two microVMs want.
func (d *Declaration) checkPorts(m *mistakes) {
	type owned struct {
		nat.Port
		key string
	}
	var all []owned
	for i, one := range d.MicroVMs {
		for j, p := range one.Ports {
			key := fmt.Sprintf("microvms[%d].ports[%d]", i, j)
			if at := slices.IndexFunc(all, func(o owned) bool { return p.Collides(o.Port) }); at >= 0 {
				m.add(key, "%s is published already in line %d", p.Outside(), d.lines[all[at].key])
			}
			if v := d.VPN; v != nil && p.Protocol == "udp" && v.Port != 0 && p.Port == v.Port {
				m.add(key, "%s is the VPN's", p.Outside())
			}
			all = append(all, owned{p, key})
		}
	}
}

// published are the hub's ports by their microVMs' uids.
func published(ctx context.Context, conns Conns) (map[string][]*ingotv1.Port, error) {
	r, err := ingotv1.NewHubClient(conns.Hub).ListPorts(ctx, &ingotv1.ListPortsRequest{})
	ports := map[string][]*ingotv1.Port{}
	for _, p := range r.GetPorts() {
		ports[p.GetUid()] = append(ports[p.GetUid()], p.GetPort())
	}
	return ports, err
}

// portChange is a declared microVM that has other ports than the file says.
type portChange struct {
	vm   placed
	want []*ingotv1.Port
}

func (c portChange) String() string {
	if len(c.want) == 0 {
		return fmt.Sprintf("~ microVM %s: no ports", c.vm.name())
	}
	return fmt.Sprintf("~ microVM %s: ports %s", c.vm.name(), strings.Join(portTexts(c.want), ", "))
}

// portChanges are those of the declared microVMs that are there.
func portChanges(declared []MicroVM, have []placed, ports map[string][]*ingotv1.Port) []portChange {
	var changes []portChange
	for _, m := range declared {
		i := slices.IndexFunc(have, func(h placed) bool { return h.name() == m.String() })
		if i < 0 {
			continue
		}
		want := m.ports()
		if !slices.Equal(portTexts(want), portTexts(ports[have[i].vm.GetSpec().GetUid()])) {
			changes = append(changes, portChange{have[i], want})
		}
	}
	return changes
}

func (m MicroVM) ports() []*ingotv1.Port {
	var all []*ingotv1.Port
	for _, p := range m.Ports {
		one := &ingotv1.Port{Protocol: p.Protocol, Port: uint32(p.Port), To: uint32(p.To)}
		if p.Address.IsValid() {
			one.Address = p.Address.String()
		}
		all = append(all, one)
	}
	return all
}

// portTexts are ports as the file has them, in order.
func portTexts(ports []*ingotv1.Port) []string {
	texts := map[string]bool{}
	for _, p := range ports {
		text := fmt.Sprintf("%d:%d/%s", p.GetPort(), p.GetTo(), p.GetProtocol())
		if p.GetAddress() != "" {
			text = p.GetAddress() + ":" + text
		}
		texts[text] = true
	}
	return slices.Sorted(maps.Keys(texts))
}

// showPorts says which ports will change, as far as the hub can be asked.
func (u *up) showPorts(ctx context.Context) []string {
	if u.was == nil {
		return nil
	}
	conns, err := u.was.Dial()
	if err != nil {
		return nil
	}
	defer conns.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	ports, err := published(ctx, conns)
	if err != nil {
		return nil
	}
	var lines []string
	for _, c := range portChanges(u.env.MicroVMs, u.have, ports) {
		lines = append(lines, c.String())
	}
	return lines
}

// publishPorts makes the ports of declared microVMs those of the file. First all are taken
// away that are not in it: another may want them.
func (u *up) publishPorts(ctx context.Context) (string, error) {
	if len(u.env.MicroVMs) == 0 {
		return "none declared", nil
	}
	have, silent := list(ctx, u.conns, u.env.Hosts())
	for _, host := range slices.Sorted(maps.Keys(silent)) {
		return "", fmt.Errorf("list microVMs of %s: %w", host, silent[host])
	}
	ports, err := published(ctx, u.conns)
	if err != nil {
		return "", fmt.Errorf("list published ports: %w", err)
	}
	hub := ingotv1.NewHubClient(u.conns.Hub)
	changes := portChanges(u.env.MicroVMs, have, ports)
	for _, c := range changes {
		uid := c.vm.vm.GetSpec().GetUid()
		wanted := portTexts(c.want)
		var gone []*ingotv1.Port
		for _, p := range ports[uid] {
			if !slices.Contains(wanted, portTexts([]*ingotv1.Port{p})[0]) {
				gone = append(gone, p)
			}
		}
		if len(gone) == 0 {
			continue
		}
		if _, err := hub.UnpublishPorts(ctx, &ingotv1.UnpublishPortsRequest{Uid: uid, Ports: gone}); err != nil {
			return "", fmt.Errorf("ports of microVM %s: %w", c.vm.name(), err)
		}
	}
	for _, c := range changes {
		if len(c.want) == 0 {
			continue
		}
		if _, err := hub.PublishPorts(ctx, &ingotv1.PublishPortsRequest{Uid: c.vm.vm.GetSpec().GetUid(), Ports: c.want, Replace: true}); err != nil {
			return "", fmt.Errorf("ports of microVM %s: %w", c.vm.name(), err)
		}
	}
	return fmt.Sprintf("%d microVMs have others than before", len(changes)), nil
}
