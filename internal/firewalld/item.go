package firewalld

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/godbus/dbus/v5"
)

// firewalld's names on the bus.
const (
	name      = "org.fedoraproject.FirewallD1"
	runtime   = dbus.ObjectPath("/org/fedoraproject/FirewallD1")
	permanent = runtime + "/config"
	direct    = name + ".direct."
	zone      = name + ".zone."
	config    = name + ".config."
)

// trusted is the zone that accepts everything, which every firewalld has: to make a
// zone or a policy of one's own it has to be reloaded, and forgets what others have
// told it.
const trusted = "trusted"

type bus struct{ conn *dbus.Conn }

func open(ctx context.Context) (bus, error) {
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	return bus{conn}, err
}

// there says whether firewalld runs.
func (b bus) there(ctx context.Context) (there bool, err error) {
	err = b.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.NameHasOwner", 0, name).Store(&there)
	return there, err
}

func (b bus) tell(ctx context.Context, method string, args ...any) error {
	return b.conn.Object(name, runtime).CallWithContext(ctx, method, 0, args...).Err
}

// is asks a question with the answer yes or no.
func (b bus) is(ctx context.Context, at dbus.ObjectPath, method string, args ...any) (yes bool, err error) {
	err = b.conn.Object(name, at).CallWithContext(ctx, method, 0, args...).Store(&yes)
	return yes, err
}

// zoneOf is the zone that an interface or a source has been put into, if it has.
func (b bus) zoneOf(ctx context.Context, at dbus.ObjectPath, method, what string) (in string, err error) {
	err = b.conn.Object(name, at).CallWithContext(ctx, method, 0, what).Store(&in)
	return in, err
}

// item is one thing that is wanted.
type item struct {
	wanted    Wants // it alone
	text, fix string
	has, kept func(context.Context) (bool, error) // at run time; for good
	add       func(context.Context) error
	remove    func(context.Context) error
}

func (i item) String() string { return fmt.Sprintf("%s (%s)", i.text, i.fix) }

func (w Wants) items(b bus) []item {
	var all []item
	add := func(i item, alone Wants) {
		i.wanted = alone
		all = append(all, i)
	}
	for _, rule := range w.Rules {
		add(b.rule(rule), Wants{Rules: []string{rule}})
	}
	for _, iface := range w.Trusted {
		add(b.member(iface, "Interface"), Wants{Trusted: []string{iface}})
	}
	for _, source := range w.Sources {
		add(b.member(source.String(), "Source"), Wants{Sources: []netip.Prefix{source}})
	}
	for _, port := range w.Open {
		add(b.port(port), Wants{Open: []Port{port}})
	}
	return all
}

// rule is a direct rule: ipv4 filter FORWARD 0 -i bond0.1000 -o bond0 -j ACCEPT.
func (b bus) rule(text string) item {
	parts := strings.Fields(text)
	priority, _ := strconv.Atoi(parts[3])
	args := []any{parts[0], parts[1], parts[2], int32(priority), parts[4:]}
	return item{
		text: "direct rule " + text,
		fix:  "firewall-cmd --direct --add-rule " + text,
		has:  func(ctx context.Context) (bool, error) { return b.is(ctx, runtime, direct+"queryRule", args...) },
		kept: func(ctx context.Context) (bool, error) {
			return b.is(ctx, permanent, config+"direct.queryRule", args...)
		},
		add:    func(ctx context.Context) error { return b.tell(ctx, direct+"addRule", args...) },
		remove: func(ctx context.Context) error { return b.tell(ctx, direct+"removeRule", args...) },
	}
}

// member is an interface or a source in the zone trusted. One that somebody has put
// into another zone is left there.
func (b bus) member(what, kind string) item {
	option := strings.ToLower(kind)
	return item{
		text: fmt.Sprintf("%s in zone %s", what, trusted),
		fix:  fmt.Sprintf("firewall-cmd --zone=%s --change-%s=%s", trusted, option, what),
		has: func(ctx context.Context) (bool, error) {
			in, err := b.zoneOf(ctx, runtime, zone+"getZoneOf"+kind, what)
			return in == trusted, err
		},
		kept: func(ctx context.Context) (bool, error) {
			in, err := b.zoneOf(ctx, permanent, config+"getZoneOf"+kind, what)
			return in == trusted, err
		},
		add: func(ctx context.Context) error {
			in, err := b.zoneOf(ctx, runtime, zone+"getZoneOf"+kind, what)
			if err != nil {
				return err
			}
			if in != "" {
				return fmt.Errorf("it is in zone %s by somebody's choice, and stays there", in)
			}
			return b.tell(ctx, zone+"add"+kind, trusted, what)
		},
		remove: func(ctx context.Context) error { return b.tell(ctx, zone+"remove"+kind, trusted, what) },
	}
}

// port is one that is open in an interface's zone, which may be the default one.
func (b bus) port(p Port) item {
	number := strconv.Itoa(int(p.Number))
	in := func(ctx context.Context) (string, error) {
		at, err := b.zoneOf(ctx, runtime, zone+"getZoneOfInterface", p.Interface)
		if err == nil && at == "" {
			err = b.conn.Object(name, runtime).CallWithContext(ctx, name+".getDefaultZone", 0).Store(&at)
		}
		return at, err
	}
	return item{
		text: fmt.Sprintf("udp %s open on %s", number, p.Interface),
		fix:  fmt.Sprintf("firewall-cmd --add-port=%s/udp, with --zone= of %s", number, p.Interface),
		has: func(ctx context.Context) (bool, error) {
			at, err := in(ctx)
			if err != nil || at == trusted {
				return err == nil, err
			}
			return b.is(ctx, runtime, zone+"queryPort", at, number, "udp")
		},
		kept: func(ctx context.Context) (bool, error) {
			at, err := in(ctx)
			if err != nil || at == trusted {
				return err == nil, err
			}
			var path dbus.ObjectPath
			if err := b.conn.Object(name, permanent).CallWithContext(ctx, config+"getZoneByName", 0, at).Store(&path); err != nil {
				return false, err
			}
			return b.is(ctx, path, config+"zone.queryPort", number, "udp")
		},
		add: func(ctx context.Context) error {
			at, err := in(ctx)
			if err != nil {
				return err
			}
			return b.tell(ctx, zone+"addPort", at, number, "udp", int32(0))
		},
		remove: func(ctx context.Context) error {
			at, err := in(ctx)
			if err != nil {
				return err
			}
			return b.tell(ctx, zone+"removePort", at, number, "udp")
		},
	}
}
