package env

import (
	"cmp"
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

// access is what the hub has for microVMs, by their uids.
type access struct {
	ports  map[string][]*ingotv1.Port
	egress map[string][]string
}

func askAccess(ctx context.Context, conns Conns) (access, error) {
	a := access{map[string][]*ingotv1.Port{}, map[string][]string{}}
	hub := ingotv1.NewHubClient(conns.Hub)
	ports, err := hub.ListPorts(ctx, &ingotv1.ListPortsRequest{})
	if err != nil {
		return a, fmt.Errorf("list published ports: %w", err)
	}
	egress, err := hub.ListEgress(ctx, &ingotv1.ListEgressRequest{})
	if err != nil {
		return a, fmt.Errorf("list what microVMs may open: %w", err)
	}
	for _, p := range ports.GetPorts() {
		a.ports[p.GetUid()] = append(a.ports[p.GetUid()], p.GetPort())
	}
	for _, e := range egress.GetEgress() {
		a.egress[e.GetUid()] = e.GetRules()
	}
	return a, nil
}

// accessChange is a declared microVM of which the hub has something else than the file says.
type accessChange struct {
	vm            placed
	ports, egress bool // what is different
	want          MicroVM
}

func (c accessChange) lines() []string {
	var lines []string
	if c.ports {
		lines = append(lines, fmt.Sprintf("~ microVM %s: ports: %s", c.want, cmp.Or(strings.Join(portTexts(c.want.ports()), ", "), "none")))
	}
	if c.egress {
		lines = append(lines, fmt.Sprintf("~ microVM %s: egress: %s", c.want, cmp.Or(strings.Join(c.want.Egress, ", "), "everything")))
	}
	return lines
}

// accessChanges are those of the declared microVMs that are there.
func accessChanges(declared []MicroVM, have []placed, now access) []accessChange {
	var changes []accessChange
	for _, m := range declared {
		i := slices.IndexFunc(have, func(h placed) bool { return h.name() == m.String() })
		if i < 0 {
			continue
		}
		uid := have[i].vm.GetSpec().GetUid()
		c := accessChange{have[i], !slices.Equal(portTexts(m.ports()), portTexts(now.ports[uid])), !slices.Equal(m.Egress, now.egress[uid]), m}
		if c.ports || c.egress {
			changes = append(changes, c)
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
	var texts []string
	for _, p := range ports {
		texts = append(texts, portText(p))
	}
	slices.Sort(texts)
	return texts
}

func portText(p *ingotv1.Port) string {
	text := fmt.Sprintf("%d:%d/%s", p.GetPort(), p.GetTo(), p.GetProtocol())
	if p.GetAddress() != "" {
		text = p.GetAddress() + ":" + text
	}
	return text
}

// showAccess says what of it will change, as far as the hub can be asked.
func (u *up) showAccess(ctx context.Context) []string {
	if u.was == nil || len(u.env.MicroVMs) == 0 {
		return nil
	}
	conns, err := u.was.Dial()
	if err != nil {
		return nil
	}
	defer conns.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	now, err := askAccess(ctx, conns)
	if err != nil {
		return nil
	}
	var lines []string
	for _, c := range accessChanges(u.env.MicroVMs, u.have, now) {
		lines = append(lines, c.lines()...)
	}
	return lines
}

// giveAccess makes what the hub has for declared microVMs what the file says. First all
// ports are taken away that are not in it: another may want them.
func (u *up) giveAccess(ctx context.Context) (string, error) {
	if len(u.env.MicroVMs) == 0 {
		return "none declared", nil
	}
	have, silent := list(ctx, u.conns, u.env.Hosts())
	for _, host := range slices.Sorted(maps.Keys(silent)) {
		return "", fmt.Errorf("list microVMs of %s: %w", host, silent[host])
	}
	now, err := askAccess(ctx, u.conns)
	if err != nil {
		return "", err
	}
	hub := ingotv1.NewHubClient(u.conns.Hub)
	changes := accessChanges(u.env.MicroVMs, have, now)
	for _, c := range changes {
		uid := c.vm.vm.GetSpec().GetUid()
		wanted := portTexts(c.want.ports())
		gone := slices.DeleteFunc(now.ports[uid], func(p *ingotv1.Port) bool { return slices.Contains(wanted, portText(p)) })
		if len(gone) > 0 {
			_, err = hub.UnpublishPorts(ctx, &ingotv1.UnpublishPortsRequest{Uid: uid, Ports: gone})
		}
		if c.egress && err == nil {
			_, err = hub.SetEgress(ctx, &ingotv1.SetEgressRequest{Uid: uid, Rules: c.want.Egress})
		}
		if err != nil {
			return "", fmt.Errorf("microVM %s: %w", c.want, err)
		}
	}
	for _, c := range changes {
		if !c.ports || len(c.want.Ports) == 0 {
			continue
		}
		if _, err := hub.PublishPorts(ctx, &ingotv1.PublishPortsRequest{Uid: c.vm.vm.GetSpec().GetUid(), Ports: c.want.ports(), Replace: true}); err != nil {
			return "", fmt.Errorf("microVM %s: %w", c.want, err)
		}
	}
	return fmt.Sprintf("%d microVMs have others than before", len(changes)), nil
}
