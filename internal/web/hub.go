package web

import (
	"context"

	dto "github.com/prometheus/client_model/go"

	"ingot/internal/hub"
)

// What is told of a hub.
var (
	hubPart      = gauge("ingot_hub_part_up", "Whether a part of the hub serves.")
	hubUnread    = gauge("ingot_hub_scrape_incomplete", "Whether something of the hub could not be measured.")
	dhcpReceived = total("ingot_hub_dhcp_received_total", "Messages of DHCP clients, by type.")
	dhcpSent     = total("ingot_hub_dhcp_sent_total", "Answers to DHCP clients, by type.")
	dhcpBroken   = total("ingot_hub_dhcp_malformed_total", "What came to the DHCP server and was no message.")
	dhcpLatency  = &measure{"ingot_hub_dhcp_answer_seconds", "Time from when a DHCP message was read until its answer was sent, with the write of its lease to disk.", dto.MetricType_HISTOGRAM}
	dhcpLeases   = gauge("ingot_hub_dhcp_leases", "Leases by state.")
	dhcpReserved = gauge("ingot_hub_dhcp_reservations", "Addresses that are kept for a client.")
	dhcpFree     = gauge("ingot_hub_dhcp_free_addresses", "Addresses that a new client could be given.")
	dhcpNone     = total("ingot_hub_dhcp_exhausted_total", "Clients that asked when no address was free.")
	dhcpTaken    = total("ingot_hub_dhcp_conflicts_total", "Addresses that were found in use by another card.")
	dhcpForeign  = gauge("ingot_hub_dhcp_foreign_servers", "Other DHCP servers that were heard on the segment lately.")
	dnsAnswers   = total("ingot_hub_dns_answers_total", "Answers to DNS questions, by where they came from: each question has one.")
	natForwards  = gauge("ingot_hub_nat_forwarding", "Whether the kernel forwards between segment and uplink.")
	natMissing   = gauge("ingot_hub_nat_rules_missing", "NAT rules that ought to be in force and are not.")
	natOpen      = gauge("ingot_hub_nat_connections", "Connections that the kernel tracks.")
	natMost      = gauge("ingot_hub_nat_connections_limit", "How many it can track.")
	vpnPeers     = gauge("ingot_hub_vpn_peers", "Devices that may come in by VPN.")
	vpnReceived  = total("ingot_hub_vpn_peer_receive_bytes_total", "Bytes that came from the device, since the interface was made.")
	vpnSent      = total("ingot_hub_vpn_peer_transmit_bytes_total", "Bytes that went to the device, since the interface was made.")
	vpnMet       = gauge("ingot_hub_vpn_peer_handshake_time_seconds", "When the device was heard last, since the Unix epoch.")
)

// HubSource is what is measured of a hub.
type HubSource struct {
	Hub *hub.Hub
}

func (s HubSource) survey(ctx context.Context) (families, error) {
	f := families{}
	n, err := s.Hub.Numbers(ctx)
	f.add(hubUnread, number(err != nil))
	for part, serves := range n.Serving {
		f.add(hubPart, number(serves), label("part", part))
	}
	f.dhcp(n)
	d := n.DNS.Answers
	for from, number := range map[string]uint64{"environment": d.Own, "cache": d.Cached, "upstream": d.Forwarded, "failed": d.Failed, "refused": d.Refused} {
		f.add(dnsAnswers, float64(number), label("from", from))
	}
	f.add(natForwards, number(n.NAT.Forwarding))
	f.add(natMissing, float64(n.NAT.Missing))
	if n.NAT.Most > 0 { // or the kernel tracks none
		f.add(natOpen, float64(n.NAT.Connections))
		f.add(natMost, float64(n.NAT.Most))
	}
	if v := n.VPN; v != nil {
		f.add(vpnPeers, float64(len(v.Peers)))
		for _, p := range v.Peers {
			peer := label("peer", p.Name)
			f.add(vpnReceived, float64(p.Received), peer)
			f.add(vpnSent, float64(p.Sent), peer)
			if !p.Handshake.IsZero() {
				f.add(vpnMet, float64(p.Handshake.UnixMilli())/1000, peer)
			}
		}
	}
	return f, err
}

func number(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

func (f families) dhcp(n hub.Numbers) {
	d := n.DHCP
	for i, kind := range n.MessageTypes {
		f.add(dhcpReceived, float64(d.Received[i]), label("type", kind))
	}
	for kind, sent := range map[string]uint64{"offer": d.Offers, "ack": d.Acks + d.Informs, "nak": d.Naks} {
		f.add(dhcpSent, float64(sent), label("type", kind))
	}
	f.add(dhcpBroken, float64(d.Malformed))
	bounds := make([]float64, len(n.LatencyBounds))
	for i, b := range n.LatencyBounds {
		bounds[i] = b.Seconds()
	}
	f.histogram(dhcpLatency, bounds, d.Answers[:], d.Took.Seconds())
	count(f, dhcpLeases, "state", n.LeaseStates, d.States)
	f.add(dhcpReserved, float64(d.Kept))
	f.add(dhcpFree, float64(d.Free))
	f.add(dhcpNone, float64(d.Exhausted))
	f.add(dhcpTaken, float64(d.Conflicts))
	f.add(dhcpForeign, float64(len(d.Foreign)))
}
