package main

import (
	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/env"
	"ingot/internal/wire"
)

// openCloud prepares the connections to an environment's machines.
func openCloud(name string) (*cloud, error) {
	e, err := env.Open(name)
	if err != nil {
		return nil, err
	}
	conns := map[string]*grpc.ClientConn{}
	for _, m := range e.Machines {
		target, err := e.Target(m)
		if err != nil {
			return nil, err
		}
		if conns[m.Name], err = wire.Dial(target); err != nil {
			return nil, err
		}
	}
	i := e.Inspection(conns)
	c := &cloud{name: name, hub: &hubClient{Machine: i.Hub, conn: conns[i.Hub.Name], HubClient: ingotv1.NewHubClient(conns[i.Hub.Name])}}
	for _, m := range i.Hosts {
		conn := conns[m.Name]
		c.hosts = append(c.hosts, &hostClient{
			Machine: m, conn: conn, HostClient: ingotv1.NewHostClient(conn), MicroVMClient: v1alpha1.NewMicroVMClient(conn),
		})
	}
	return c, nil
}
