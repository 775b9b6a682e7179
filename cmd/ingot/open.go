package main

import (
	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/env"
)

// openCloud prepares the connections to an environment's machines.
func openCloud(name string) (*cloud, error) {
	e, err := env.OpenUp(name)
	if err != nil {
		return nil, err
	}
	conns, err := e.Dial()
	if err != nil {
		return nil, err
	}
	i := e.Inspection(conns)
	c := &cloud{name: name, inspection: i, hub: &hubClient{Machine: i.Hub, conn: conns.Hub, HubClient: ingotv1.NewHubClient(conns.Hub)}}
	for _, m := range i.Hosts {
		conn := conns.Hosts[m.Name]
		c.hosts = append(c.hosts, &hostClient{
			Machine: m, conn: conn, HostClient: ingotv1.NewHostClient(conn), MicroVMClient: v1alpha1.NewMicroVMClient(conn),
		})
	}
	return c, nil
}
